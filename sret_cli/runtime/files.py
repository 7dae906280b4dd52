"""Files that are written whole or not at all, directories, and the lock of a run's directory."""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sret_cli.runtime.errors import CHECKPOINT, DATA, RESOURCES, USAGE, SretError

LOCK_FILE, HOLDER_FILE = ".lock", ".lock.json"


def make_directory(path: Path) -> Path:
    """The directory, made with its parents where it is missing.

    Raises:
        SretError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise cannot_write_error(path, error) from None
    return path


def cannot_write_error(path: Path, error: OSError, needed: int | None = None) -> SretError:
    """The user's error for a file or directory that could not be written, of so many bytes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        size = "" if needed is None else f" ({needed:,} bytes, and {free:,} are free)"
        message = f"no room left on the disk to write {path}{size}; free some"
        return SretError(message, RESOURCES, status="disk_full")
    return SretError(f"cannot write {path}: {error.strerror}; choose another directory", USAGE)


_points: Counter[str] = Counter()


def reached(name: str) -> None:
    """A named point of writing, where `SRET_KILL_AT=name:count` has the process end by SIGKILL.

    So tests can show that a run survives its end at any of them; else nothing is done.
    """
    if wanted := os.environ.get("SRET_KILL_AT"):
        _points[name] += 1
        if wanted == f"{name}:{_points[name]}":
            os.kill(os.getpid(), signal.SIGKILL)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file that is there whole or not at all, also after a power cut.

    Raises:
        SretError: the directory cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Names of files need not be UTF-8; a report has their odd bytes as \udcff.
    data = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reached(f"{path.name} written")
        os.replace(temporary, path)
        reached(f"{path.name} renamed")
        sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write_error(path, error, len(data)) from None
        raise


def sync_directory(path: Path) -> None:
    """Makes what a directory lists survive a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_not_shorter(path: Path, position: int) -> None:
    """Makes sure that a file has all the bytes that a checkpoint counts.

    Raises:
        SretError: it has fewer, or is not there.
    """
    found = path.stat().st_size if path.is_file() else 0
    if found < position:
        raise SretError(
            f"{path} has {found:,} bytes, and the checkpoint counts {position:,}; put it back, or "
            "remove the run's directory to start over",
            CHECKPOINT,
        )


class LineFile:
    """A file that is written line by line, each of which is there as soon as it is written.

    What stands after the first `position` bytes is cut off.

    Raises:
        SretError: the file has fewer bytes, it cannot be written, or the disk is full.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path, self.position = path, position
        try:
            check_not_shorter(path, position)
            self.file = open(path, "r+b" if position else "wb", buffering=0)
            if position:
                self.file.truncate(position)
                self.file.seek(position)
        except OSError as error:
            raise cannot_write_error(path, error) from None

    def write(self, line: str) -> None:
        """Writes a line, whole or not at all: the system may take a part of it on a full disk."""
        data = f"{line}\n".encode()
        rest = data
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(self.position)
                self.file.seek(self.position)
            raise cannot_write_error(self.path, error, len(data)) from None
        self.position += len(data)
        reached(f"{self.path.name} line")

    def sync(self) -> None:
        """Makes the lines so far survive a power cut."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise cannot_write_error(self.path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class Busy(SretError):
    """Another process works on the run."""


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Keeps every other process from working on a run; the system frees it if this one dies.

    Raises:
        Busy: another process has it; the message names it.
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
            write_json(directory / HOLDER_FILE, mine)
            for stale in directory.glob(".*.tmp"):  # of a process that was killed while it wrote
                stale.unlink(missing_ok=True)
        yield
    finally:
        if lock.lock_counter == 1:
            (directory / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def _holder(directory: Path) -> str:
    try:
        holder = read_json(directory / HOLDER_FILE)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (SretError, KeyError, TypeError):
        return "another process"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON document atomically; NaN and infinity are refused."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON document.

    Raises:
        SretError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise SretError(f"cannot read {path}: {error.strerror}", DATA) from None
    except ValueError:
        raise SretError(f"{path} is not JSON; remove it and run again", DATA) from None


def utc_now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
