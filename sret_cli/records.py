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
from typing import Any

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
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


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
    """The row of a run directory, or None where there is none yet."""
    path = directory / "row.json"
    return read_json(path) if path.exists() else None


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run directory, of a study's directory, or of everything under a root of runs.

    Rows come in the order of their studies and of the time at which they started.

    Raises:
        SretError: there is no such directory, or a row in it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise SretError(f"no directory {path}; run a study first, or name where its runs are", DATA)
    files = [f for depth in ("", "*/", "*/*/") for f in path.glob(f"{depth}row.json")]
    rows = [read_json(file) for file in files]
    return sorted(rows, key=lambda r: (r["study"], r["started_at"], r["run_id"]))


def newest_run(root: Path) -> Path:
    """The directory of the run under a root that was trained last.

    Raises:
        SretError: no run under it was trained.
    """
    rows = [row for row in read_rows(root) if row["final_loss"] is not None]
    if not rows:
        raise SretError(f"no trained runs in {root}; train one with `sret train`", DATA)
    newest = max(rows, key=lambda row: row["started_at"])
    return root / newest["study"] / newest["run_id"]


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
