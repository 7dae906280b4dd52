"""Files that are complete or absent, whatever interrupts the writing, and directories."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sret_cli.runtime.errors import CHECKPOINT, DATA, RESOURCES, USAGE, SretError


def make_directory(path: Path) -> Path:
    """Creates a directory with its parents if it is missing, and returns it.

    Raises:
        SretError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise cannot_write_error(path, error) from None
    return path


def cannot_write_error(path: Path, error: OSError, needed: int | None = None) -> SretError:
    """The error for a file or directory that could not be written, `needed` bytes long."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        size = "" if needed is None else f" ({needed:,} bytes, and {free:,} are free)"
        message = f"no room left on the disk to write {path}{size}; free some"
        return SretError(message, RESOURCES, status="disk_full")
    return SretError(f"cannot write {path}: {error.strerror}; choose another directory", USAGE)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file so that it is complete or absent, also after a power cut.

    Raises:
        SretError: the directory cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # File names need not be UTF-8: Python holds such bytes as surrogates, such as \udcff.
    data = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write_error(path, error, len(data)) from None
        raise


def sync_directory(path: Path) -> None:
    """Makes the entries of a directory survive a power cut (fsync)."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_not_shorter(path: Path, position: int) -> None:
    """Raises if a file is shorter than the checkpoint recorded.

    Raises:
        SretError: the file is shorter, or does not exist.
    """
    found = path.stat().st_size if path.is_file() else 0
    if found < position:
        raise SretError(
            f"{path} has {found:,} bytes, and the checkpoint counts {position:,}; put it back, or "
            "remove the run's directory to start over",
            CHECKPOINT,
        )


class LineFile:
    """A file of lines, unbuffered: each line is in the file as soon as it is written.

    Everything after the first `position` bytes is cut off.

    Raises:
        SretError: the file is shorter, cannot be written, or the disk is full.
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
        """Writes a complete line or nothing: on a full disk the system may accept only a part."""
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

    def sync(self) -> None:
        """Makes the lines written so far survive a power cut (fsync)."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise cannot_write_error(self.path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


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
    except (ValueError, RecursionError):
        raise SretError(f"{path} is not JSON; remove it and run again", DATA) from None


def utc_now() -> str:
    """The current time in UTC, to the second, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
