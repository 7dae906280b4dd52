"""Signals that ask a training to stop. The handler only sets a flag, so that steps are finished.

A step that takes longer than `PATIENCE` is abandoned, because a scheduler does not wait.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sret_cli.runtime.errors import names_loader_process

# 75 is EX_TEMPFAIL of sysexits.h: Slurm sends SIGUSR1 or SIGUSR2 before a job's time is up, and the
# job's script should requeue the job when it sees this code.
START_AGAIN = 75
EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: START_AGAIN,
    signal.SIGUSR2: START_AGAIN,
}
PATIENCE = 10  # seconds


class Interrupted(Exception):
    """A signal asked the training to stop; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Stop:
    """The exit code of the signal that arrived, if one did."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.gives_up = (
            True  # whether a long step may be abandoned; not where other ranks wait in it
        )

    def __call__(self, number: int, frame: Any) -> None:
        """Sets the flag. A second Ctrl-C ends the process at once."""
        self.code = EXIT_CODES[signal.Signals(number)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.gives_up:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def check(self) -> None:
        """Raises where the training's state is complete and can be saved.

        Raises:
            Interrupted: a signal arrived.
        """
        if self.code is not None:
            self.be_patient()
            raise Interrupted(self.code)

    def explains(self, error: RuntimeError) -> bool:
        """Whether a signal ended the loader processes and so caused this error.

        A signal that goes to all processes may reach this one last.
        """
        if self.code is None and names_loader_process(error):
            time.sleep(1)
        return self.code is not None

    def be_patient(self) -> None:
        """Cancels the alarm, so that saving can take its time."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def give_up(self, number: int, frame: Any) -> NoReturn:
        """Abandons a step that takes too long.

        Raises:
            Interrupted: always.
        """
        assert self.code is not None
        raise Interrupted(self.code)


def ignore_ended_processes() -> None:
    """Removes torch's handler, which raises anywhere in the code when a loader process ends.

    Steps and checkpoints are then always completed; the next batch raises the error.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def exit_as_signalled(code: int) -> NoReturn:
    """Ends the process as the signal with this exit code would."""
    if code == EXIT_CODES[signal.SIGINT]:
        raise KeyboardInterrupt
    raise SystemExit(code)


_came_late: list[int] = []


def exit_if_signalled() -> None:
    """Ends the process if a signal came at the very end of a training, which then was completed."""
    if _came_late:
        exit_as_signalled(_came_late.pop())


@contextmanager
def catching_signals() -> Iterator[Stop]:
    """Yields a flag that signals set. Outside the main thread no signal sets it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in EXIT_CODES}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop.give_up)
    try:
        yield stop
        if stop.code is not None:  # it came after the last check, and the training is complete
            _came_late.append(stop.code)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
