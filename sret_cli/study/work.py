"""Does the runs of a study one after another on this machine, and skips what is done."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.files import read_json
from sret_cli.runtime.lock import Busy, locked_directory
from sret_cli.runtime.progress import Display
from sret_cli.spec.contents import Contents
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import CONFIG_FILE, Row, Run
from sret_cli.study.axes import run_labels
from sret_cli.study.dispatch import Team
from sret_cli.study.execute import execute_run, missing_measurements, profile_run
from sret_cli.study.file import Study
from sret_cli.study.paths import PATH_FIELDS, check_path
from sret_cli.study.rows import planned_row, provenance, read_row, same_settings


@dataclass
class Outcome:
    """The rows of a study's runs, the number of runs that were done before, and what failed."""

    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    failed: list[tuple[Run, SretError]] = field(default_factory=list)


def run_study(
    study: Study, root: Path, options: RunOptions, console: Console, trains: bool = True
) -> Outcome:
    """Profiles and, if asked, trains each run of a study, and writes their rows.

    A run that fails for a reason of its own (diverged, out of memory) becomes a row with `error`,
    and the study continues. Of several processes that torchrun or Slurm started, rank 0 does this;
    the others only take part in its trainings, and exit from here.

    Raises:
        SretError: the data, the device or the root cannot be used, which would fail every run; or
            timm cannot build the backbone of a run.
    """
    team = Team(options) if trains else None
    if team is not None and not team.is_leader:
        team.follow()
    with nullcontext() if team is None else team.leading():
        return _StudyEngine(study, root, options, console, team).run()


class _StudyEngine:
    """One pass over the runs of a study; `team` is None if nothing is trained."""

    def __init__(
        self, study: Study, root: Path, options: RunOptions, console: Console, team: Team | None
    ) -> None:
        self.study, self.root, self.options, self.team = study, root, options, team
        self.console = console
        self.display = Display(console, study.name, len(study.runs))
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Does all runs that are not done."""
        if self.team is not None:
            _check_paths(self.study)
        runs = _identified(self.study, self.team is not None, self.display)
        self.study = replace(self.study, runs=tuple(runs))
        _check_backbones(self.study, self.root)
        labels = run_labels([planned_row(run) for run in runs])
        with self._reporting_interruption(), self.display.live():
            for number, (run, label) in enumerate(zip(runs, labels, strict=True), 1):
                summary = self._do(run, label)
                self.display.finish(f"[{number}/{len(runs)}] {summary}")
        return self.outcome

    def _do(self, run: Run, label: str) -> str:
        """Does what is missing of one run, and adds its row; returns one line about it."""
        if not run.is_identified:
            self.outcome.rows.append(profile_run(run, self.options)[0])
            return f"{run.name}: measured, not kept"
        directory = run.directory(self.root)
        row = read_row(directory) or {**planned_row(run), **provenance()}
        missing = missing_measurements(row, run, self.options, self.team is not None)
        if missing:
            self._measure(run, row, missing, directory, label)
        else:
            self.outcome.skipped += 1
        self.outcome.rows.append(row)
        return _summary(label, row, bool(missing))

    def _measure(self, run: Run, row: Row, missing: list[str], directory: Path, label: str) -> None:
        """Takes the missing measurements of a run into its row.

        Raises:
            SretError: an error that would fail every run.
        """
        self.display.start(label)
        if run.train is None or "training" in missing:
            row |= {"status": None, "error": None, **provenance()}
            row |= {k: v for k, v in planned_row(run).items() if k.startswith("train.")}
        if "training" in missing:
            _note_other_contents(run, self.root, self.display)
        try:
            with locked_directory(directory):
                execute_run(
                    run,
                    row,
                    missing=missing,
                    directory=directory,
                    options=self.options,
                    progress=self.display.of_run(),
                    team=self.team,
                )
        except SretError as error:
            if self.team is not None and self.team.lost:
                raise
            if not isinstance(error, Busy) and not row["error"]:
                _remove_unless_begun(directory)
                raise
            row |= {"status": row["status"] or "busy", "error": str(error)}
            self.outcome.failed.append((run, error))

    @contextmanager
    def _reporting_interruption(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.console.print(
                f"stopped: {len(self.outcome.rows)} of {len(self.study.runs)} runs finished (in "
                f"{self.root / self.study.name}); run the same command again to resume"
            )
            raise


def _identified(study: Study, trains: bool, display: Display) -> list[Run]:
    """The runs with the contents of what they read, without repetition.

    Measuring needs no data: if the data are missing, the run has no id and its row is not kept.

    Raises:
        SretError: the run is to be trained, and data, weights or labels are missing.
    """
    if all(run.is_identified and run.contents is None for run in study.runs):
        return list(study.runs)
    from sret_cli.training.identify import Identifier

    identifier = Identifier()
    found: dict[Any, Run] = {}
    for run in study.runs:
        try:
            run = identifier.identify(run)
            found.setdefault(run.run_id, run)
        except SretError as error:
            if trains:
                raise
            display.note(f"{run.name}: measured and not kept: {error}")
            found[id(run)] = run
    return list(found.values())


def _note_other_contents(run: Run, root: Path, display: Display) -> None:
    """Notes that a new run shares nothing with a run of the same settings and other data."""
    directory = run.directory(root)
    if directory.exists():
        return
    for path in sorted(directory.parent.glob(f"*/{CONFIG_FILE}")):
        other = read_json(path)
        if same_settings(other, run.spec()):
            differ = Contents.of(other.get("contents")).differences(run.contents or Contents())
            display.note(
                f"{path.parent} has the same settings, but other {' and '.join(differ)}: "
                f"{run.run_id} is a new run and shares nothing with it"
            )


def _remove_unless_begun(directory: Path) -> None:
    """Removes the directory of a run that could not start, and the study's directory if empty."""
    if not (directory / "row.json").exists() and not list(directory.glob("checkpoint-*")):
        shutil.rmtree(directory, ignore_errors=True)
        for parent in list(directory.parents)[:2]:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _check_backbones(study: Study, root: Path) -> None:
    """Builds each timm model of a study once, so that an invalid one fails before the first run."""
    known = [run for run in study.runs if run.is_identified]
    new = [run for run in known if read_row(run.directory(root)) is None]
    for spec in dict.fromkeys(run.model for run in new):
        if spec.is_timm and len(new) > 1:
            from sret_cli.model.backbone import build_backbone

            build_backbone(spec)


def _check_paths(study: Study) -> None:
    for run in study.runs:
        if run.train is not None and run.contents is None:
            for name in PATH_FIELDS:
                check_path(name, getattr(run.train, name), study.folder)


def _summary(label: str, row: Row, was_missing: bool) -> str:
    if row["error"]:
        return f"{label}: failed: {row['error']}"
    top1 = row["top1_percent"]
    accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
    return f"{label}{accuracy}" + ("" if was_missing else ": already done")
