"""Worker processes on this machine that take the runs of a study: the local engine.

The launcher imports no torch. It starts a worker for each share of the machine, says when runs end,
and replaces a worker that dies, whose run goes on from its checkpoint.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from sret_cli.runtime.errors import SOME_FAILED, SretError
from sret_cli.runtime.lock import LAUNCH, holder_of
from sret_cli.spec.run import Row, Run
from sret_cli.study.deaths import cause_of_death, last_lines, record_death
from sret_cli.study.rows import read_row
from sret_cli.study.shares import Share
from sret_cli.study.worker import Work

LOOK_SECONDS = 0.5  # between two looks at rows that other commands write
STOP_SECONDS = 120.0  # for workers to save their state
EARLY_DEATHS = 3  # of workers that started no run, after which the command ends
OnEnd = Callable[[Run, Row], None]


@dataclass
class Slot:
    """A place for a worker: its share of the machine, its process, and the run that it does."""

    share: Share
    log: Path
    process: subprocess.Popen[str] | None = None
    pid: int = 0
    run_id: str | None = None
    error: SretError | None = None
    has_started: bool = False


@dataclass
class Pool:
    """Worker processes at the runs of a study.

    Attributes:
        work: what there is to do; its runs are identified.
        shares: the part of the machine of each worker.
        on_end: called with each run that ends, and its row.
        on_look: called a few times a second.
        retries: how often a run resumes after its process died.
    """

    work: Work
    shares: Sequence[Share]
    on_end: OnEnd
    on_look: Callable[[], None] = lambda: None
    retries: int = 2
    events: "Queue[tuple[Slot, dict[str, Any]]]" = field(default_factory=Queue)

    def run(self) -> None:
        """Does all runs that are not done; returns when each has a row, or others do the rest.

        Raises:
            SretError: an error that would fail every run, or `fail_fast` and a run failed.
        """
        self.launch = uuid.uuid4().hex
        self.left = {run.run_id: run for run in self.work.study.runs}
        self.early_deaths = 0
        with tempfile.TemporaryDirectory(prefix="sret-") as folder:
            self.folder = Path(folder)
            logs = [self.folder / f"worker-{number}.log" for number in range(len(self.shares))]
            slots = [Slot(*pair) for pair in zip(self.shares, logs, strict=True)]
            try:
                self._take_rows()
                for slot in slots[: len(self.left)]:
                    self._start(slot)
                self._watch(slots)
            finally:
                self._stop(slots)

    def _watch(self, slots: list[Slot]) -> None:
        looked = 0.0
        while self.left:
            self._handle_events(LOOK_SECONDS / 2)
            for slot in slots:
                if slot.process is not None and slot.process.poll() is not None:
                    self._handle_end(slot)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                self._take_rows()
                self.on_look()
            if self.left and not any(slot.process for slot in slots):
                if not self.work.waits:
                    return
                self._start(slots[0])  # every worker has ended, but a row was removed meanwhile

    def _handle_events(self, seconds: float) -> None:
        try:
            slot, event = self.events.get(timeout=seconds)
        except Empty:
            return
        if event["event"] == "hello":
            slot.pid = event["pid"]
        elif event["event"] == "start":
            slot.run_id, slot.has_started = event["run"], True
        elif event["event"] == "end":
            slot.run_id = None
            self._take_rows([event["run"]])
        elif event["event"] == "error":
            slot.error = SretError(event["message"], event["code"])

    def _handle_end(self, slot: Slot) -> None:
        """A worker has ended: as it should, with an error of the whole study, or by dying.

        Raises:
            SretError: an error that would fail every run.
        """
        assert slot.process is not None
        while not self.events.empty():
            self._handle_events(0)
        code, slot.process = slot.process.returncode, None
        self._take_rows()
        if slot.error is not None:
            raise slot.error
        if code == 0:
            return
        cause = cause_of_death(code)
        run = self._run_of(slot)
        if run is not None:
            directory = run.directory(self.work.root)
            if record_death(run, directory, slot.pid, cause, self.retries) is not None:
                self._take_rows([run.run_id])
        elif not slot.has_started:
            self.early_deaths += 1
            if self.early_deaths >= EARLY_DEATHS:
                told = "; ".join(last_lines(slot.log))
                raise SretError(f"workers end before they start a run: {cause}; {told}", 1)
        slot.run_id = None
        if self.left:
            self._start(slot)

    def _run_of(self, slot: Slot) -> Run | None:
        """The run that a worker did when it died: as it said, or whose directory it held."""
        if slot.run_id in self.left:
            return self.left[slot.run_id]
        for run in self.left.values():
            holder = holder_of(run.directory(self.work.root)) or {}
            mine = holder.get("pid"), holder.get("launch")
            if mine == (slot.pid, self.launch):
                return run
        return None

    def _take_rows(self, run_ids: Sequence[str] | None = None) -> None:
        take_rows(self.work, self.left, self.on_end, run_ids)

    def _start(self, slot: Slot) -> None:
        options = replace(self.work.options, workers=slot.share.loaders)
        if slot.share.gpus:
            options = replace(options, device="cuda")
        path = self.folder / f"{slot.log.stem}.work"
        path.write_bytes(pickle.dumps(replace(self.work, options=options)))
        command = [sys.executable, "-m", "sret_cli.study.worker", str(path)]
        if slot.share.processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--max-restarts=0"]
            torchrun += [f"--nproc-per-node={slot.share.processes}", "-m"]
            command = [sys.executable, "-m", *torchrun, *command[2:]]
        slot.error, slot.has_started, slot.run_id = None, False, None
        with open(slot.log, "ab") as log:
            slot.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **slot.share.environment(), LAUNCH: self.launch},
                start_new_session=True,
            )
        slot.pid = slot.process.pid
        threading.Thread(target=self._listen, args=(slot, slot.process), daemon=True).start()

    def _listen(self, slot: Slot, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # torchrun's own words
            if isinstance(event, dict) and "event" in event:
                self.events.put((slot, event))

    def _stop(self, slots: list[Slot]) -> None:
        """Lets workers save their state and end; kills those that do not in time."""
        running = [slot.process for slot in slots if slot.process is not None]
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def take_rows(
    work: Work, left: dict[str, Run], on_end: OnEnd, run_ids: Sequence[str] | None = None
) -> None:
    """Takes the rows of runs that have ended, also of those that other commands did.

    Args:
        work: what there is to do.
        left: the runs without a row, by their ids; those with a row are removed.
        on_end: called with each run that has ended, and its row.
        run_ids: the runs to look at; by default all that are left.

    Raises:
        SretError: `fail_fast` and a run failed.
    """
    from sret_cli.study.execute import missing_measurements

    for run_id in list(left) if run_ids is None else run_ids:
        run = left.get(run_id)
        row = None if run is None else read_row(run.directory(work.root))
        if run is None or row is None:
            continue
        if not missing_measurements(row, run, work.options, work.trains):
            del left[run_id]
            on_end(run, row)
            if row["error"] and work.options.fail_fast:
                raise SretError(f"run {run_id} failed: {row['error']}", SOME_FAILED)
