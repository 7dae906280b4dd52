"""Run directories and rows: the run directory is the truth, and a table is what its rows say.

`<root>/<study>/<run_id>/` holds `config.json`, `metrics.jsonl`, `model.safetensors` and, written
last and atomically, `row.json`: one flat row of spec fields, measurements with their unit in the
name, and provenance. No file is shared between runs, so any number of processes can work on one
study.
"""

import errno
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sret_cli import __version__
from sret_cli.errors import DATA, RESOURCES, USAGE, SretError

Row = dict[str, Any]

# What a run can measure; a row holds each of them, null where it was not measured.
MEASUREMENTS = (
    "layers",
    "params",
    "macs",
    "activations",
    "activation_bytes",
    "measured_device",
    "measured_device_name",
    "measured_batch_size",
    "measured_precision",
    "forward_seconds",
    "forward_seconds_iqr",
    "step_seconds",
    "step_seconds_iqr",
    "inference_images_per_second",
    "training_images_per_second",
    "peak_memory_bytes",
    "epochs_trained",
    "train_seconds",
    "images_per_second",
    "final_loss",
    "test_loss",
    "top1_percent",
    "top5_percent",
    "test_images",
    "bad_images",
)


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
        raise cannot_write(path, error) from None
    return path


def cannot_write(path: Path, error: OSError) -> SretError:
    """The user's error for a file or directory that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SretError(f"no room left on the disk to write {path}; free some", RESOURCES)
    return SretError(f"cannot write {path}: {error.strerror}; choose another directory", USAGE)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file that is there whole or not at all, also after a power cut.

    Raises:
        SretError: the directory cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class LineFile:
    """A file that is written line by line, each of which is there as soon as it is written.

    Raises:
        SretError: the file cannot be written, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = open(path, "w", encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error) from None

    def write(self, line: str) -> None:
        """Writes a line and flushes it."""
        try:
            self.file.write(line + "\n")
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.file.close()
        except OSError as error:
            raise cannot_write(self.path, error) from None


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


def read_row(directory: Path) -> Row | None:
    """The row of a run directory, or None where there is none yet.

    Raises:
        SretError: the row is damaged.
    """
    path = directory / "row.json"
    if not path.exists():
        return None
    row = read_json(path)
    if not isinstance(row, dict) or not {"study", "run_id", "started_at", "layers"} <= row.keys():
        raise SretError(f"{path} is not a row; remove it and run again", DATA)
    return {**dict.fromkeys((*MEASUREMENTS, "error")), **row}


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run directory, of a study's directory, or of everything under a root of runs.

    Rows come in the order of their studies and of the time at which they started.

    Raises:
        SretError: there is no such directory, or a row in it is damaged.
    """
    path = Path(path)
    return list(_rows_by_directory(path).values())


def _rows_by_directory(path: Path) -> dict[Path, Row]:
    if not path.is_dir():
        raise SretError(f"no directory {path}; run a study first, or name where its runs are", DATA)
    directories = [f.parent for d in ("", "*/", "*/*/") for f in path.glob(f"{d}row.json")]
    rows = {directory: read_row(directory) or {} for directory in directories}
    order = ("study", "started_at", "run_id")
    return dict(sorted(rows.items(), key=lambda item: [item[1][key] for key in order]))


def newest_run(root: Path) -> Path:
    """The directory of the run under a root that was trained last.

    Raises:
        SretError: no run under it was trained.
    """
    rows = {d: row for d, row in _rows_by_directory(root).items() if row["final_loss"] is not None}
    if not rows:
        raise SretError(f"no trained runs in {root}; train one with `sret train`", DATA)
    return max(rows, key=lambda directory: rows[directory]["started_at"])


def provenance() -> Row:
    """Who made a row: versions, commit of the working directory, time."""
    return {
        "sret_version": __version__,
        "python_version": platform.python_version(),
        "git_commit": git_commit(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The commit that the working directory is at, or None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
