"""Signals that ask a training to stop: the handler only sets a flag, and a step is finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# Exit codes; 75 is sysexits.h's EX_TEMPFAIL: Slurm warns by one of these before the time is up, and
# a script that sees it should requeue the job.
AGAIN = 75
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: AGAIN, signal.SIGUSR2: AGAIN}


class Interrupted(Exception):
    """A training has been asked to stop, with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
        self.agreed = True  # of several processes, all stop


class Stop:
    """Which exit code a signal asked for, if one came."""

    def __init__(self) -> None:
        self.code: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        """Sets the flag; a second Ctrl-C ends the process at once."""
        self.code = CODES[signal.Signals(number)]
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Ends a training at a place where its state is whole.

        Raises:
            Interrupted: a signal came.
        """
        if self.code is not None:
            raise Interrupted(self.code)


def leave(code: int) -> NoReturn:
    """Ends the process by the way of the signal that asked for that exit code."""
    if code == CODES[signal.SIGINT]:
        raise KeyboardInterrupt
    raise SystemExit(code)


@contextmanager
def listening() -> Iterator[Stop]:
    """Signals set the flag that is handed out, until the end; outside the main thread none does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in CODES}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
