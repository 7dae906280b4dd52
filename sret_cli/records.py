"""Run directories and rows: the run directory is the truth, and a table is what its rows say.

`<root>/<study>/<run_id>/` holds `config.json`, `metrics.jsonl`, checkpoints, `model.safetensors`
and, written last and atomically, `row.json`: one flat row of spec fields, measurements with their
unit in the name, and provenance. No file is shared between runs, so any number of processes can
work on one study, and a lock keeps two from the same run.
"""

import errno
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sret_cli import __version__
from sret_cli.contents import CONTENTS_OF, Contents, without_places
from sret_cli.errors import CHECKPOINT, DATA, RESOURCES, USAGE, SretError

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
    "measured_compile",
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
    "best_top1_percent",
    "ema_test_loss",
    "ema_top1_percent",
    "ema_top5_percent",
    "bad_images",
    "world_size",
)
OUTCOME = ("status", "error")  # what became of the training, and the reason where it failed
# Of a training: how it handles what goes wrong, which does not make it another one.
HANDLING = {"on_bad_image": "stop"}
# Fields of a model or a training that came later, and their values that change nothing: with these
# they are no part of a run's id, and configs that lack them are the same.
LATER_FIELDS = {
    "label_column": None,
    "reset_head": False,
    "drop_path_ramp": "per_pass",
    "warmup_lr": None,
    "sched_on_updates": True,
    "model_ema_warmup": False,
}
PLACES = {f"train.{place}" for place in CONTENTS_OF}
CONFIG_FILE = "config.json"
EMA_DIRECTORY = "ema"  # of a run: its averaged weights
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
        raise cannot_write(path, error) from None
    return path


def cannot_write(path: Path, error: OSError, needed: int | None = None) -> SretError:
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
            raise cannot_write(path, error, len(data)) from None
        raise


def sync_directory(path: Path) -> None:
    """Makes what a directory lists survive a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def refuse_shorter(path: Path, position: int) -> None:
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
            refuse_shorter(path, position)
            self.file = open(path, "r+b" if position else "wb", buffering=0)
            if position:
                self.file.truncate(position)
                self.file.seek(position)
        except OSError as error:
            raise cannot_write(path, error) from None

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
            raise cannot_write(self.path, error, len(data)) from None
        self.position += len(data)
        reached(f"{self.path.name} line")

    def sync(self) -> None:
        """Makes the lines so far survive a power cut."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class Busy(SretError):
    """Another process works on the run."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
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
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
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


def write_config(directory: Path, config: Row) -> None:
    """Writes `config.json` of a run; one that is there has to say the same, and keeps the rest.

    Raises:
        SretError: it says something else; the message names the keys.
    """
    path = directory / CONFIG_FILE
    if path.exists():
        found = read_json(path)
        refuse_other_config(f"{path}", found, config)
        config = {**found, **config}
    write_json(path, config)


def refuse_other_config(where: str, found: Any, config: Row) -> None:
    """Makes sure that a stored config has the model and the training of another.

    `HANDLING` may differ, and the places where what is read lies, not its contents.

    Raises:
        SretError: it has not; the message names the keys that differ, with both values.
    """
    stored, wanted = _flat(found), _flat(config)
    differ = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if differ:
        values = ", ".join(f"{k} ({stored.get(k)!r}, not {wanted.get(k)!r})" for k in differ[:8])
        more = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise SretError(
            f"{where} is of another run: {values}{more} differ; use another directory", CHECKPOINT
        )


def same_settings(one: Any, other: Row) -> bool:
    """Whether two configs have the same model and training, but for what the latter reads."""
    told, wanted = (
        {key: value for key, value in _flat(config).items() if key not in PLACES}
        for config in (one, other)
    )
    same = isinstance(one, dict) and one.get("continues") == other.get("continues")
    return same and told == wanted


def _flat(config: Any) -> Row:
    """The fields of the tables `model` and `train` but for those left out, and sums of contents."""
    config = json.loads(json.dumps(config))
    tables = config if isinstance(config, dict) else {}
    train, contents = tables.get("train"), Contents.of(tables.get("contents"))
    if isinstance(train, dict) and {"dataset", *CONTENTS_OF} <= train.keys():
        tables = {**tables, "train": without_places(train, contents)}
    return {
        f"{table}.{key}": value
        for table in ("model", "train")
        for key, value in (tables.get(table) or {}).items()
        if not ((table == "train" and key in HANDLING) or is_later_default(key, value))
    }


def is_later_default(field: str, value: Any) -> bool:
    """Whether a field came later, and has the value that changes nothing."""
    return field in LATER_FIELDS and value == LATER_FIELDS[field]


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
    return {**dict.fromkeys((*MEASUREMENTS, *OUTCOME)), **row}


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
    found = {directory: read_row(directory) for directory in directories}
    rows = {directory: row for directory, row in found.items() if row is not None}
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


def run_directory(directory: Path) -> Path:
    """The absolute path of the run whose averaged weights a directory has, else the directory's."""
    directory = Path(os.path.abspath(directory))  # its name is the run's, also where it is "."
    parent = directory.parent
    is_averaged = directory.name == EMA_DIRECTORY and (parent / CONFIG_FILE).is_file()
    return parent if is_averaged else directory


def provenance() -> Row:
    """Who made a row: versions, commit of the working directory, time."""
    return {
        "sret_version": __version__,
        "python_version": platform.python_version(),
        "git_commit": git_commit(),
        "started_at": now(),
    }


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit that the working directory is at, or None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
