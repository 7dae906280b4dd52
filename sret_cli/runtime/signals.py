"""Signals that ask a training to stop: the handler only sets a flag, and a step is finished.

A step that takes longer than `PATIENCE` is given up, since a scheduler does not wait.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sret_cli.runtime.errors import names_loader_process

# Exit codes; 75 is sysexits.h's EX_TEMPFAIL: Slurm warns by one of these before the time is up, and
# a script that sees it should requeue the job.
START_AGAIN = 75
EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: START_AGAIN,
    signal.SIGUSR2: START_AGAIN,
}
PATIENCE = 10  # seconds


class Interrupted(Exception):
    """A training has been asked to stop, with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Stop:
    """Which exit code a signal asked for, if one came."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.gives_up = True  # a step that takes long; not one that others wait in

    def __call__(self, number: int, frame: Any) -> None:
        """Sets the flag; a second Ctrl-C ends the process at once."""
        self.code = EXIT_CODES[signal.Signals(number)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.gives_up:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def check(self) -> None:
        """Ends a training at a place where its state is whole.

        Raises:
            Interrupted: a signal came.
        """
        if self.code is not None:
            self.be_patient()
            raise Interrupted(self.code)

    def explains(self, error: RuntimeError) -> bool:
        """Whether a signal ended the loader's processes, which is what the error says.

        One that goes to all may reach this process last.
        """
        if self.code is None and names_loader_process(error):
            time.sleep(1)
        return self.code is not None

    def be_patient(self) -> None:
        """Gives what follows, the saving, the time that it takes."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def give_up(self, number: int, frame: Any) -> NoReturn:
        """Ends a step, or whatever else takes too long.

        Raises:
            Interrupted: always.
        """
        assert self.code is not None
        raise Interrupted(self.code)


def ignore_ended_processes() -> None:
    """Removes torch's handler, which raises wherever the code is when a loader's process ends.

    So steps and checkpoints are always completed. The next batch then raises the error.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def exit_as_signalled(code: int) -> NoReturn:
    """Ends the process by the way of the signal that asked for that exit code."""
    if code == EXIT_CODES[signal.SIGINT]:
        raise KeyboardInterrupt
    raise SystemExit(code)


@contextmanager
def catching_signals() -> Iterator[Stop]:
    """Signals set the flag that is handed out, until the end; outside the main thread none does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in EXIT_CODES}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop.give_up)
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
