"""What a run is doing now: a small file in its directory that `sret status` reads."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.files import read_json, utc_now, write_json
from sret_cli.runtime.progress import Pace, Progress

LIVE_FILE = "progress.json"
SECONDS = 2.0  # between two writes


class LiveFile:
    """Writes the progress of a run into its directory, every two seconds at most."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock = directory / LIVE_FILE, clock
        self.pace, self.next = Pace(), 0.0

    def following(self, progress: Progress) -> Progress:
        """The same progress, which is also written into the file."""

        def on_step(done: int, total: int, text: str) -> None:
            self.write(done, total, text)
            progress.on_step(done, total, text)

        return Progress(on_step, progress.note)

    def write(self, done: int, total: int, text: str) -> None:
        """Writes where a training is, unless it did so a moment ago."""
        left = self.pace.left(done, total)
        if self.clock() < self.next:
            return
        self.next = self.clock() + SECONDS
        state = {"step": done, "steps": total, "text": text, "left": left, "at": utc_now()}
        where = {"pid": os.getpid(), "host": socket.gethostname()}
        write_json(self.path, {**state, **where})

    def remove(self) -> None:
        """Removes the file, when the training has ended."""
        with suppress(OSError):
            self.path.unlink()


def read_live(directory: Path) -> dict[str, Any] | None:
    """What a run said last about its progress, or None."""
    try:
        found = read_json(directory / LIVE_FILE)
    except SretError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
