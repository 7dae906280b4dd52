"""Which engine does the runs of a study: this process, or workers here or elsewhere.

An engine is a module with a function `run(work, engine, board)`, which starts processes that take
the runs of `work` until each has a row, and waits for them or sets `board.is_submitted`. All of
them claim and resume runs in the same way, in the directories of the runs; so a study can be begun
by one engine and finished by another.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path

from rich.console import Console

from sret_cli.runtime.errors import SOME_FAILED, USAGE, SretError
from sret_cli.runtime.processes import rank_and_world_size
from sret_cli.runtime.progress import Display
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Row, Run
from sret_cli.study.axes import run_labels
from sret_cli.study.file import Study
from sret_cli.study.live import read_live
from sret_cli.study.rows import planned_row
from sret_cli.study.weight import weight_of
from sret_cli.study.work import (
    Outcome,
    check_backbones,
    check_paths,
    identified_runs,
    run_study,
    summary_line,
)
from sret_cli.study.worker import Work

ENGINES = {
    "local": "sret_cli.study.local",
    "ray": "sret_cli.study.ray_engine",
    "slurm": "sret_cli.study.slurm_engine",
}


@dataclass(frozen=True)
class EngineOptions:
    """Who does the runs of a study; this does not change their results.

    Attributes:
        engine: local, ray or slurm.
        jobs: the number of runs at a time, or None for what is fastest.
        gpus_per_run: GPUs of one run, which torchrun trains.
        runs_per_gpu: runs that share a GPU.
        retries: how often a run resumes after its process died.
        address: address of a Ray cluster; None for one on this machine.
        slurm: options of sbatch by name, such as partition and gres.
        wait: whether to wait for the end of a Slurm job.
    """

    engine: str = "local"
    jobs: int | None = 1
    gpus_per_run: int = 1
    runs_per_gpu: int = 1
    retries: int = 2
    address: str | None = None
    slurm: tuple[tuple[str, str], ...] = ()
    wait: bool = False

    @property
    def is_this_process(self) -> bool:
        """Whether runs are done one after another in this process."""
        alone = self.jobs == 1 and self.gpus_per_run == self.runs_per_gpu == 1
        return self.engine == "local" and alone


def do_study(
    study: Study,
    root: Path,
    options: RunOptions,
    engine: EngineOptions,
    console: Console,
    trains: bool = True,
) -> Outcome:
    """Does the runs of a study that are not done, and returns the rows of all.

    Raises:
        SretError: an error that would fail every run.
    """
    if rank_and_world_size()[1] > 1 and not engine.is_this_process:
        raise SretError(
            "--jobs starts processes of its own; leave out torchrun or srun, or use --gpus-per-run",
            USAGE,
        )
    if engine.is_this_process:
        return run_study(study, root, options, console, trains)
    display = Display(console, study.name, len(study.runs))
    study = prepared(study, root, display.note, trains)
    todo = [run for run in study.runs if run.is_identified]
    ordered = tuple(sorted(todo, key=weight_of, reverse=True))
    work = Work(replace(study, runs=ordered), root, options, trains)
    board = Board(study, root, display)
    with board.showing():
        import_module(ENGINES[engine.engine]).run(work, engine, board)
    return board.outcome()


def prepared(study: Study, root: Path, note: Callable[[str], None], trains: bool) -> Study:
    """The study with the contents of what its runs read, after a check of paths and backbones."""
    if trains:
        check_paths(study)
    study = replace(study, runs=tuple(identified_runs(study, trains, note)))
    check_backbones(study, root)
    return study


class Board:
    """What a launcher shows of a study: a line when a run ends, and the time that is left."""

    def __init__(self, study: Study, root: Path, display: Display) -> None:
        self.study, self.root, self.display = study, root, display
        labels = run_labels([planned_row(run) for run in study.runs])
        self.rows: dict[str, Row] = {}
        self.labels = {
            run.run_id: label
            for run, label in zip(study.runs, labels, strict=True)
            if run.is_identified
        }
        self.weights = {run.run_id: weight_of(run) for run in study.runs if run.is_identified}
        self.began, self.before = time.monotonic(), 0.0
        self.skipped = 0
        self.is_first_look = True
        self.is_submitted = False  # whether a job does the runs, which nobody here waits for

    def note(self, line: str) -> None:
        """Prints a line that stays."""
        self.display.note(line)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Shows the bar; says how far the study is if it is interrupted."""
        try:
            with self.display.live():
                yield
        except (KeyboardInterrupt, SystemExit):
            self.display.console.print(
                f"stopped: {len(self.rows)} of {len(self.study.runs)} runs finished; run the same "
                "command again to resume"
            )
            raise

    def on_end(self, run: Run, row: Row) -> None:
        """Prints a line about a run that has a row."""
        was_done = self.is_first_look
        self.rows[run.run_id] = row
        self.skipped += was_done
        self.before += self.weights[run.run_id] * was_done
        summary = summary_line(self.labels[run.run_id], row, not was_done)
        self.display.finish(f"[{len(self.rows)}/{len(self.study.runs)}] {summary}")

    def on_look(self) -> None:
        """Updates the time that is left, by the weights of the runs that are done."""
        self.is_first_look = False
        if self.display.console.is_terminal:
            self.display.show_runs(self._running())
        done = sum(self.weights[run_id] for run_id in self.rows) - self.before
        left = sum(self.weights.values()) - self.before - done
        if done > 0 and left > 0:
            seconds = round((time.monotonic() - self.began) * left / done)
            self.display.tell(f"about {timedelta(seconds=seconds)} left")

    def _running(self) -> dict[str, tuple[int, int, str]]:
        """Steps and text of the runs that are under way, by their labels."""
        found = {}
        for run in self.study.runs:
            if run.is_identified and run.run_id not in self.rows:
                if live := read_live(run.directory(self.root)):
                    text = f"{live.get('left', '–')} left, {live.get('text', '')}"
                    found[self.labels[run.run_id]] = live["step"], live["steps"], text
        return found

    def outcome(self) -> Outcome:
        """The rows in the order of the study's runs, and those that failed."""
        runs = [run for run in self.study.runs if run.is_identified and run.run_id in self.rows]
        rows = [self.rows[run.run_id] for run in runs]
        failed = [
            (run, SretError(row["error"], SOME_FAILED))
            for run, row in zip(runs, rows, strict=True)
            if row["error"]
        ]
        return Outcome(rows, self.skipped, failed, self.is_submitted)
