"""A process that takes run after run of a study: `python -m sret_cli.study.worker FILE`.

The file holds the `Work`, pickled by the launcher that started this process. While a run is under
way, what is printed goes to `worker.log` in its directory. Standard input is a pipe from the
launcher: when it closes, the launcher is gone, and the worker saves its state and ends. Standard
output carries one JSON object a line to the launcher.
"""

import faulthandler
import json
import os
import pickle
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.lock import Busy
from sret_cli.runtime.processes import is_leader
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Row, Run
from sret_cli.study.deaths import LOG_FILE
from sret_cli.study.dispatch import Team
from sret_cli.study.file import Study
from sret_cli.study.work import Item, StudyWork

DONE = 0  # all runs have rows, or others do them


@dataclass(frozen=True)
class Work:
    """What a worker has to do: the runs of a study, in this order, whose contents are known.

    Attributes:
        study: the study; its runs are identified.
        root: the directory of all runs.
        options: how and where runs are executed.
        trains: whether runs are trained, or only measured.
        waits: whether a worker waits for runs that others do, in case they are interrupted.
    """

    study: Study
    root: Path
    options: RunOptions
    trains: bool = True
    waits: bool = True


class WorkerWork(StudyWork):
    """The work of one of several workers: it ends when others do all that is left."""

    def __init__(self, work: Work, team: Team | None, tell: "Channel") -> None:
        console = Console(stderr=True, highlight=False, markup=False, emoji=False, width=200)
        super().__init__(work.study, work.root, work.options, console, team)
        self.tell, self.waits = tell, work.waits

    def _measure(self, item: Item, row: Row, missing: list[str], directory: Path) -> None:
        self.tell(event="start", run=item.run.run_id)
        try:
            with self.tell.logging_to(directory / LOG_FILE):
                print(f"{item.label}: process {os.getpid()}", flush=True)
                super()._measure(item, row, missing, directory)
        finally:
            self.tell(event="end", run=item.run.run_id)

    def _prepare(self) -> list[Run]:
        """The runs as they are: the launcher has prepared them."""
        return list(self.study.runs)

    def _note_busy(self, item: Item, error: Busy) -> None:
        """Says nothing: the other workers are at the same study."""
        item.waited = True


class Channel:
    """Events for the launcher on the first standard output; prints go elsewhere from then on."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        self.idle = os.dup(2)
        self._print_to(self.idle)

    def __call__(self, **event: Any) -> None:
        """Sends an event; a launcher that is gone does not read it."""
        try:
            self.out.write(json.dumps(event) + "\n")
        except (BrokenPipeError, ValueError):
            pass

    def logging_to(self, path: Path) -> "_Logging":
        """A context in which everything that is printed is appended to a file."""
        return _Logging(self, path)

    def _print_to(self, descriptor: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)


class _Logging:
    def __init__(self, channel: Channel, path: Path) -> None:
        self.channel, self.path = channel, path

    def __enter__(self) -> None:
        log = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.channel._print_to(log)
        os.close(log)

    def __exit__(self, *error: object) -> None:
        self.channel._print_to(self.channel.idle)


def watch_launcher() -> None:
    """Asks this process to stop, as SIGTERM does, when standard input closes."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(path: Path) -> int:
    """Does the work in a file; returns the exit code."""
    work: Work = pickle.loads(path.read_bytes())
    tell = Channel()
    faulthandler.enable()
    leads = is_leader()
    if leads:
        tell(event="hello", pid=os.getpid())
        watch_launcher()
    try:
        team = Team(work.options) if work.trains else None
        if team is not None and not team.is_leader:
            team.follow()
        worker = WorkerWork(work, team, tell)
        if team is None:
            worker.run()
        else:
            with team.leading():
                worker.run()
    except SretError as error:
        tell(event="error", message=str(error), code=error.code)
        return error.code
    return DONE


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
