"""The runs of a study, one after another on this machine; what is there stays."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from sret_cli.study.execute import _measure, _missing, profile_run
from sret_cli.study.file import Study
from sret_cli.study.paths import PATH_FIELDS, check_path
from sret_cli.study.rows import provenance, read_row, same_settings

if TYPE_CHECKING:
    pass
from sret_cli.study.rows import planned_row


@dataclass
class Outcome:
    """The rows of a study's runs, how many runs were there already, and what failed."""

    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    failed: list[tuple[Run, SretError]] = field(default_factory=list)


def run_study(
    study: Study, root: Path, options: RunOptions, console: Console, trains: bool = True
) -> Outcome:
    """Profiles and, where asked, trains each run of a study, and writes their rows.

    A run that fails for a reason of its own (diverged, out of memory) becomes a row with `error`,
    and the others go on. Of several processes that torchrun or Slurm started, the first one does
    so, and the others take part in its trainings, and leave here.

    Raises:
        SretError: the data, the device or the root cannot be used, which would fail every run; or
            a run's backbone cannot be built, which is found out before the first run starts.
    """
    team = Team(options) if trains else None
    if team is not None and not team.is_leader:
        team.follow()
    with nullcontext() if team is None else team.leading():
        return _run_study(study, root, options, console, trains, team)


def _run_study(
    study: Study, root: Path, options: RunOptions, console: Console, trains: bool, team: Team | None
) -> Outcome:
    if trains:
        _check_paths(study)
    outcome = Outcome()
    display = Display(console, study.name, len(study.runs))
    study = replace(study, runs=tuple(_identified(study, trains, display)))
    _check_backbones(study, root)
    labels = run_labels([planned_row(run) for run in study.runs])
    with _says_what_was_kept(study, root, outcome, console), display.live():
        for number, (run, label) in enumerate(zip(study.runs, labels, strict=True), 1):
            if not run.is_identified:
                outcome.rows.append(profile_run(run, options)[0])
                display.finish(f"[{number}/{len(study.runs)}] {run.name}: measured, not kept")
                continue
            directory = run.directory(root)
            row = read_row(directory) or {**planned_row(run), **provenance()}
            missing = _missing(row, run, options, trains)
            if not missing:
                outcome.skipped += 1
            else:
                display.start(label)
                if run.train is None or "training" in missing:
                    row |= {"status": None, "error": None, **provenance()}
                    row |= {k: v for k, v in planned_row(run).items() if k.startswith("train.")}
                if "training" in missing:
                    _note_other_contents(run, root, display)
                try:
                    with locked_directory(directory):
                        _measure(missing, row, run, directory, options, display, team)
                except SretError as error:
                    if team is not None and team.lost:
                        raise
                    if not isinstance(error, Busy) and not row["error"]:
                        _remove_unless_begun(directory)
                        raise
                    row |= {"status": row["status"] or "busy", "error": str(error)}
                    outcome.failed.append((run, error))
            outcome.rows.append(row)
            display.finish(f"[{number}/{len(study.runs)}] {_summary(label, row, bool(missing))}")
    return outcome


def _identified(study: Study, trains: bool, display: Display) -> list[Run]:
    """The runs with the contents of what they read, each once, though it was named in two ways.

    Measuring needs no data: where they are missing, the run has no id to keep its row by.

    Raises:
        SretError: it is to be trained, and data, weights or labels are missing.
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
    """Says that a new run shares nothing with one of the same settings and of other data."""
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
    """Removes what a run left that could not be done, and the study's directory if it is empty."""
    if not (directory / "row.json").exists() and not list(directory.glob("checkpoint-*")):
        shutil.rmtree(directory, ignore_errors=True)
        for parent in list(directory.parents)[:2]:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _check_backbones(study: Study, root: Path) -> None:
    known = [run for run in study.runs if run.is_identified]
    new = [run for run in known if read_row(run.directory(root)) is None]
    for spec in dict.fromkeys(run.model for run in new):
        if spec.is_timm and len(new) > 1:
            from sret_cli.model.backbone import build_backbone

            build_backbone(spec)


def _check_paths(study: Study) -> None:
    for run in study.runs:
        if run.train is not None and run.contents is None:
            for field in PATH_FIELDS:
                check_path(field, getattr(run.train, field), study.folder)


@contextmanager
def _says_what_was_kept(
    study: Study, root: Path, outcome: Outcome, console: Console
) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        console.print(
            f"stopped: {len(outcome.rows)} of {len(study.runs)} runs are done and kept in "
            f"{root / study.name}; type the same command to go on where the one under way was"
        )
        raise


def _summary(label: str, row: Row, done: bool) -> str:
    if row["error"]:
        return f"{label}: failed: {row['error']}"
    top1 = row["top1_percent"]
    accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
    return f"{label}{accuracy}" + ("" if done else ": there already")
