"""Run directories and rows: the run directory is the truth, and a table is what its rows say.

`<root>/<study>/<run_id>/` holds `config.json`, `metrics.jsonl`, checkpoints, `model.safetensors`
and, written last and atomically, `row.json`: one flat row of spec fields, measurements with their
unit in the name, and provenance. No file is shared between runs, so any number of processes can
work on one study, and a lock keeps two from the same run.
"""

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sret_cli import __version__
from sret_cli.runtime.errors import DATA, SretError
from sret_cli.runtime.files import read_json, utc_now
from sret_cli.spec.contents import CONTENTS_OF
from sret_cli.spec.run import Row, Run, flat
from sret_cli.training.config import _flat

# All measurements. Every row has each of them; null means not measured.
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
    "images_seen",
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
TEXTS = ("measured_device", "measured_device_name", "measured_precision", "measured_compile")
LARGEST = 1e300  # of a measurement
OUTCOME = ("status", "error")  # of the training, and the reason if it failed
PLACES = {f"train.{place}" for place in CONTENTS_OF}


def same_settings(one: Any, other: Row) -> bool:
    """Whether two configs have the same model and training, apart from what the training reads."""
    told, wanted = (
        {key: value for key, value in _flat(config).items() if key not in PLACES}
        for config in (one, other)
    )
    same = isinstance(one, dict) and one.get("continues") == other.get("continues")
    return same and told == wanted


def read_row(directory: Path) -> Row | None:
    """The row of a run directory, or None if there is none yet.

    Raises:
        SretError: the row is damaged.
    """
    path = directory / "row.json"
    if not path.exists():
        return None
    row = read_json(path)
    if not isinstance(row, dict) or not _is_row(row):
        raise SretError(f"{path} is not a row; remove it and run again", DATA)
    return {**dict.fromkeys((*MEASUREMENTS, *OUTCOME)), **row}


def _is_row(row: dict[str, Any]) -> bool:
    """Whether a table from a file has what every row has, each of the right kind."""
    if not {"study", "run_id", "started_at", "layers"} <= row.keys():
        return False
    texts = all(isinstance(row[key], str) for key in ("study", "run_id", "started_at"))
    texts = texts and isinstance(row.get("name"), str | None)
    texts = texts and isinstance(row.get("train.seed"), int | None)
    numbers = [row.get(column) for column in MEASUREMENTS if column not in TEXTS]
    return texts and all(
        value is None or isinstance(value, int | float) and -LARGEST < value < LARGEST
        for value in numbers
    )


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run directory, of a study's directory, or of everything under a root of runs.

    Rows are sorted by study, then by the time at which they started.

    Raises:
        SretError: the directory does not exist, or a row in it is damaged.
    """
    return list(rows_by_directory(Path(path)).values())


def rows_by_directory(
    path: Path, on_damaged: Callable[[SretError], None] | None = None
) -> dict[Path, Row]:
    """The rows under a directory, as `read_rows` sorts them, by the directories of their runs.

    Args:
        path: a run directory, a study's, or the root of all.
        on_damaged: called with the error of each damaged row, which is left out then.

    Raises:
        SretError: the directory does not exist, or a row is damaged and `on_damaged` is None.
    """
    if not path.is_dir():
        raise SretError(
            f"no directory {path}; run a study first, or name the directory of its runs", DATA
        )
    directories = [f.parent for d in ("", "*/", "*/*/") for f in path.glob(f"{d}row.json")]
    rows: dict[Path, Row] = {}
    for directory in directories:
        try:
            row = read_row(directory)
        except SretError as error:
            if on_damaged is None:
                raise
            on_damaged(error)
            continue
        if row is not None:
            rows[directory] = row
    order = ("study", "started_at", "run_id")
    return dict(sorted(rows.items(), key=lambda item: [item[1][key] for key in order]))


def newest_run(root: Path) -> Path:
    """The directory of the newest trained run under a root.

    Raises:
        SretError: no run under it was trained.
    """
    rows = {d: row for d, row in rows_by_directory(root).items() if row["final_loss"] is not None}
    if not rows:
        raise SretError(f"no trained runs in {root}; train one with `sret train`", DATA)
    return max(rows, key=lambda directory: rows[directory]["started_at"])


def provenance() -> Row:
    """Where a row comes from: versions, commit of the working directory, time."""
    return {
        "sret_version": __version__,
        "python_version": platform.python_version(),
        "git_commit": git_commit(),
        "started_at": utc_now(),
    }


def git_commit() -> str | None:
    """The git commit of the working directory, or None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def planned_row(run: Run) -> Row:
    """The part of a run's row that is known before it runs; measurements are null."""
    run_id = run.run_id if run.is_identified else None
    row: Row = {"study": run.study, "run_id": run_id, "name": run.name, "role": run.role}
    row["twin_of"] = (run.twin_of_ids or None) if run.is_identified else None
    row |= flat("model", run.spec()["model"])
    if run.train is not None:
        row |= {f"train.{k}": v for k, v in run.spec()["train"].items()}
    if run.continues is not None:
        row["continues"] = run.continues
    row |= {} if run.contents is None else run.contents.table()
    return row | dict.fromkeys((*MEASUREMENTS, *OUTCOME)) | {"layers": run.model.layers}
