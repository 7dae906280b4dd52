"""Does the runs of a study that are not done and that nobody else does.

The run directory is the truth: a run is done if it has a row, and somebody does it if its directory
is locked. So any number of processes and machines that see the same directory can work on a study.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sret_cli.runtime.errors import SOME_FAILED, SretError
from sret_cli.runtime.files import read_json
from sret_cli.runtime.lock import Busy, locked_directory
from sret_cli.runtime.progress import Display
from sret_cli.runtime.signals import exit_if_signalled
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.contents import Contents
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import CONFIG_FILE, Row, Run
from sret_cli.study.axes import run_labels
from sret_cli.study.deaths import died_unrecorded, forget_deaths
from sret_cli.study.dispatch import Team
from sret_cli.study.execute import execute_run, missing_measurements, profile_run
from sret_cli.study.file import Study
from sret_cli.study.live import LiveFile
from sret_cli.study.paths import PATH_FIELDS, check_path
from sret_cli.study.rows import planned_row, provenance, read_row, same_settings

RETRY = "--retry failed"
POLL_SECONDS = 1.0  # between two looks at runs that other processes do


@dataclass
class Outcome:
    """The rows of a study's runs, the number of runs that were done before, and what failed.

    `is_submitted` says that a job does the runs that have no row, which nobody here waits for.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    failed: list[tuple[Run, SretError]] = field(default_factory=list)
    is_submitted: bool = False


def run_study(
    study: Study, root: Path, options: RunOptions, console: Console, trains: bool = True
) -> Outcome:
    """Profiles and, if asked, trains each run of a study, and writes their rows.

    A run that fails for a reason of its own (diverged, out of memory) becomes a row with `error`,
    and the study continues. A run that another process does is waited for, and its row is taken.
    Of several processes that torchrun or Slurm started, rank 0 does this; the others only take
    part in its trainings, and exit from here.

    Raises:
        SretError: the data, the device or the root cannot be used, which would fail every run; or
            timm cannot build the backbone of a run.
    """
    team = Team(options) if trains else None
    if team is not None and not team.is_leader:
        team.follow()
    with nullcontext() if team is None else team.leading():
        return StudyWork(study, root, options, console, team).run()


class StudyWork:
    """The work on the runs of a study; `team` is None if nothing is trained."""

    def __init__(
        self, study: Study, root: Path, options: RunOptions, console: Console, team: Team | None
    ) -> None:
        self.study, self.root, self.options, self.team = study, root, options, team
        self.console = console
        self.display = Display(console, study.name, len(study.runs))
        self.outcome = Outcome()
        self.waits = True  # for runs that other processes do

    def run(self) -> Outcome:
        """Does all runs that are not done."""
        runs = self._prepare()
        labels = run_labels([planned_row(run) for run in runs])
        items = [Item(*item) for item in zip(range(1, len(runs) + 1), runs, labels, strict=True)]
        with self._reporting_interruption(), self.display.live():
            todo = items
            while todo:
                busy = []
                for item in todo:
                    busy += [] if self._do(item) else [item]
                    exit_if_signalled()
                if len(busy) == len(todo):
                    if not self.waits:
                        break
                    self._wait(busy)
                todo = busy
        self.outcome.rows = [item.row for item in items if item.row is not None]
        return self.outcome

    def _prepare(self) -> list[Run]:
        """The runs with the contents of what they read, after a check of paths and backbones."""
        if self.team is not None:
            check_paths(self.study)
        runs = identified_runs(self.study, self.team is not None, self.display.note)
        self.study = replace(self.study, runs=tuple(runs))
        check_backbones(self.study, self.root)
        return runs

    def _do(self, item: "Item") -> bool:
        """Does what is missing of one run, and takes its row; False if another process does it."""
        run = item.run
        if not run.is_identified:
            item.row = profile_run(run, self.options)[0]
            return self._finish(item, f"{run.name}: measured, not kept")
        directory = run.directory(self.root)
        row = self._row(run)
        if self._missing(row, run) and died_unrecorded(directory):
            item.waited = True
            return False
        if not (missing := self._missing(row, run)):
            self.outcome.skipped += not item.waited
            return self._take(item, row, was_missing=item.waited)
        if "training" in missing and not item.waited:
            _note_other_contents(run, self.root, self.display)
        try:
            with locked_directory(directory):
                row = self._row(run)  # another process may have written it before we had the lock
                if missing := self._missing(row, run):
                    self._measure(item, row, missing, directory)
        except Busy as error:
            self._note_busy(item, error)
            return False
        except SretError as error:
            if self.team is not None and self.team.lost or not row["error"]:
                LiveFile(directory).remove()
                _remove_unless_begun(directory)
                raise
            self.outcome.failed.append((run, error))
            item.row = row
            return self._finish(item, summary_line(item.label, row, True))
        return self._take(item, row, was_missing=True)

    def _row(self, run: Run) -> Row:
        return read_row(run.directory(self.root)) or {**planned_row(run), **provenance()}

    def _missing(self, row: Row, run: Run) -> list[str]:
        return missing_measurements(row, run, self.options, self.team is not None)

    def _take(self, item: "Item", row: Row, was_missing: bool) -> bool:
        """Takes a row that is complete, or that another process wrote."""
        item.row = row
        if row["error"]:
            again = "" if was_missing else f"; {RETRY} runs it again"
            self.outcome.failed.append((item.run, SretError(f"{row['error']}{again}", SOME_FAILED)))
        return self._finish(item, summary_line(item.label, row, was_missing))

    def _finish(self, item: "Item", summary: str) -> bool:
        self.display.finish(f"[{item.number}/{len(self.study.runs)}] {summary}")
        return True

    def _note_busy(self, item: "Item", error: Busy) -> None:
        """Says once which runs other processes do; they are looked at again later."""
        if not item.waited:
            reason = str(error).partition(";")[0]
            self.display.note(f"{item.label}: {reason}; its row is taken when it ends")
        item.waited = True

    def _wait(self, busy: list["Item"]) -> None:
        """Waits a moment for runs that other processes do."""
        self.display.start(f"waiting for {len(busy)} runs of other processes")
        time.sleep(POLL_SECONDS)

    def _measure(self, item: "Item", row: Row, missing: list[str], directory: Path) -> None:
        """Takes the missing measurements of a run into its row; its directory is locked.

        Raises:
            SretError: the run failed, or an error that would fail every run.
        """
        run = item.run
        self.display.start(item.label)
        if run.train is None or "training" in missing:
            row |= {"status": None, "error": None, **provenance()}
            row |= {k: v for k, v in planned_row(run).items() if k.startswith("train.")}
        live = LiveFile(directory)
        execute_run(
            run,
            row,
            missing=missing,
            directory=directory,
            options=self.options,
            progress=live.following(self.display.of_run()),
            team=self.team,
            is_alone=len(self.study.runs) == 1,
        )
        live.remove()
        forget_deaths(directory)

    @contextmanager
    def _reporting_interruption(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.console.print(
                f"stopped: {self.display.finished} of {len(self.study.runs)} runs finished (in "
                f"{self.root / self.study.name}); run the same command again to resume"
            )
            raise


@dataclass
class Item:
    """A run of the study in progress, with its number and label; its row once it is known."""

    number: int
    run: Run
    label: str
    row: Row | None = None
    waited: bool = False


def identified_runs(study: Study, trains: bool, note: Callable[[str], None]) -> list[Run]:
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
            note(f"{run.name}: measured and not kept: {error}")
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


def check_backbones(study: Study, root: Path) -> None:
    """Builds each timm model of a study once, so that a study of invalid ones fails at once.

    Raises:
        SretError: no run of the study has a model that can be built.
    """
    known = [run for run in study.runs if run.is_identified]
    new = [run for run in known if read_row(run.directory(root)) is None]
    specs = list(dict.fromkeys(run.model for run in new))
    backbones = [spec for spec in specs if isinstance(spec, BackboneSpec)]
    if len(new) < 2 or len(backbones) < len(specs):
        return
    from sret_cli.model.backbone import build_backbone

    for number, spec in enumerate(backbones, 1):
        try:
            build_backbone(spec)
            return
        except SretError:
            if number == len(specs):
                raise


def check_paths(study: Study) -> None:
    """Raises if a place that a run reads from does not exist."""
    for run in study.runs:
        if run.train is not None and run.contents is None:
            for name in PATH_FIELDS:
                check_path(name, getattr(run.train, name), study.folder)


def summary_line(label: str, row: Row, was_missing: bool) -> str:
    """One line about a run that has ended."""
    if row["error"]:
        return f"{label}: failed: {row['error']}"
    top1 = row["top1_percent"]
    accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
    return f"{label}{accuracy}" + ("" if was_missing else ": already done")
