"""What the runs of a study are doing, from their directories alone."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import DATA, SretError
from sret_cli.runtime.files import read_json
from sret_cli.runtime.lock import holder_of
from sret_cli.spec.run import CONFIG_FILE, Row, flat
from sret_cli.study.axes import run_labels
from sret_cli.study.deaths import deaths_of
from sret_cli.study.execute import LOST
from sret_cli.study.live import read_live
from sret_cli.study.plan import load_planned, settings_key
from sret_cli.study.rows import planned_row, read_row

STATES = ("done", "running", "waiting", "failed", "lost")
STALE_SECONDS = 120.0  # after which a run of another machine that says nothing is not running


@dataclass(frozen=True)
class RunStatus:
    """What one run is doing.

    Attributes:
        label: the run, for people.
        state: one of `STATES`.
        directory: its directory, or None if it has none yet.
        row: its row, or None.
        live: what it said last about its progress: step, steps, text, left, host, pid.
        deaths: how often its process died.
    """

    label: str
    state: str
    directory: Path | None = None
    row: Row | None = None
    live: dict[str, Any] | None = None
    deaths: int = 0

    def record(self) -> dict[str, Any]:
        """The status as plain values."""
        row, live = self.row or {}, self.live or {}
        return {
            "run": self.label,
            "run_id": None if self.directory is None else self.directory.name,
            "study": None if self.directory is None else self.directory.parent.name,
            "state": self.state,
            "error": row.get("error"),
            "top1_percent": row.get("top1_percent"),
            "deaths": self.deaths,
            **{key: live.get(key) for key in ("step", "steps", "text", "left", "host", "pid")},
        }


def study_status(path: Path | None, root: Path) -> list[RunStatus]:
    """The status of each run of a study file, or of all runs in a directory.

    Args:
        path: a study file, a directory of runs, or None for all runs.
        root: the directory of all runs.

    Raises:
        SretError: the study file is not valid, or the directory does not exist.
    """
    directory = status_directory(path, root)
    if path is not None and directory != path and (found := _of_file(path, root)) is not None:
        return found
    if not directory.is_dir():
        raise SretError(f"no directory {directory}; start runs by `sret run STUDY`", DATA)
    configs = sorted(c for d in ("", "*/", "*/*/") for c in directory.glob(f"{d}{CONFIG_FILE}"))
    found = [_of_directory(config.parent) for config in configs]
    rows = [status.row or _planned(status.directory) for status in found]
    labels = run_labels([row for row in rows if row is not None])
    named = iter(labels)
    return [
        replace(status, label=next(named)) if row is not None else status
        for status, row in zip(found, rows, strict=True)
    ]


def status_directory(path: Path | None, root: Path) -> Path:
    """The directory with the runs of a study file or of a directory; that of all if not given."""
    if path is not None and path.suffix == ".toml" and not path.is_dir():
        return root / path.stem
    return path or root


def count_states(found: Sequence[RunStatus]) -> dict[str, int]:
    """How many runs are in each state, without those in which none is."""
    counts = {state: sum(status.state == state for status in found) for state in STATES}
    return {state: count for state, count in counts.items() if count}


def _of_file(path: Path, root: Path) -> list[RunStatus] | None:
    by_key: dict[str, RunStatus] = {}
    rows = []
    for config in sorted((root / path.stem).glob(f"*/{CONFIG_FILE}")):
        status = _of_directory(config.parent)
        row = _planned(config.parent) or status.row
        if row is not None:
            by_key[settings_key(row)] = status
            rows.append(row)
    if (study := load_planned(path, rows)) is None:
        return None
    planned = [planned_row(replace(run, contents=None)) for run in study.runs]
    labels = run_labels(planned)
    return [
        replace(by_key.get(settings_key(row), RunStatus("", "waiting")), label=label)
        for row, label in zip(planned, labels, strict=True)
    ]


def _of_directory(directory: Path) -> RunStatus:
    """The status of the run in a directory."""
    try:
        row = read_row(directory)
    except SretError as error:
        row = {"run_id": directory.name, "error": str(error), "status": "failed"}
    status = RunStatus(directory.name, "waiting", directory, row, deaths=len(deaths_of(directory)))
    live = read_live(directory)
    if _is_held(directory, live):
        return replace(status, state="running", live=live or holder_of(directory))
    if row is not None and row["error"]:
        return replace(status, state=LOST if row["status"] == LOST else "failed")
    if row is not None and (row.get("final_loss") is not None or "train.epochs" not in row):
        return replace(status, state="done")
    return replace(status, live=live)


def _is_held(directory: Path, live: dict[str, Any] | None) -> bool:
    """Whether a process works on a run: it lives here, or said so lately from another machine."""
    holder = holder_of(directory)
    if holder is None:
        return False
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except PermissionError:
            return True
        except (OSError, KeyError, TypeError, ValueError):
            return False
        return True
    try:
        said = datetime.fromisoformat((live or holder)["at" if live else "since"])
    except (KeyError, TypeError, ValueError):
        return False
    return (datetime.now(UTC) - said).total_seconds() < STALE_SECONDS


def _planned(directory: Path | None) -> Row | None:
    """The settings of a run without a row, by its config; None if that cannot be read."""
    if directory is None:
        return None
    try:
        config = read_json(directory / CONFIG_FILE)
        row: Row = {"study": directory.parent.name, "run_id": directory.name}
        row["name"] = config["name"]
        row |= flat("model", config["model"])
        row |= {f"train.{key}": value for key, value in (config["train"] or {}).items()}
        row["layers"] = None
        return row | ({"continues": config["continues"]} if config.get("continues") else {})
    except (SretError, KeyError, TypeError, AttributeError):
        return None
