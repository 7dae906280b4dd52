"""The lock of a run's directory, by which only one process at a time works on a run."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.runtime.files import make_directory, read_json, utc_now, write_json

LOCK_FILE, HOLDER_FILE = ".lock", ".lock.json"
LAUNCH = "SRET_LAUNCH"  # variable with the id of the command that started this process


class Busy(SretError):
    """Another process holds the lock of a run's directory."""


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Locks a run's directory against all other processes; the system unlocks it if this one dies.

    Raises:
        Busy: another process holds the lock; the message names it.
    """
    from filelock import FileLock, Timeout

    make_directory(directory)
    lock = FileLock(directory / LOCK_FILE, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        message = f"{directory} is in use by {_holder(directory)}; wait for it, or end it"
        raise Busy(message, USAGE) from None
    try:
        if lock.lock_counter == 1:
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": utc_now()}
            mine |= {"launch": os.environ[LAUNCH]} if LAUNCH in os.environ else {}
            write_json(directory / HOLDER_FILE, mine)
            for stale in directory.glob(
                ".*.tmp"
            ):  # left by a process that was killed while writing
                stale.unlink(missing_ok=True)
        yield
    finally:
        if lock.lock_counter == 1:
            (directory / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def holder_of(directory: Path) -> dict[str, Any] | None:
    """Process, machine and launch that hold a directory, or that held it when they died."""
    try:
        holder = read_json(directory / HOLDER_FILE)
    except SretError:
        return None
    return holder if isinstance(holder, dict) else None


def _holder(directory: Path) -> str:
    try:
        holder = holder_of(directory) or {}
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except KeyError:
        return "another process"
