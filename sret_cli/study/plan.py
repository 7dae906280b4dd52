"""Which rows belong to the runs of a study file, and which of its runs have none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sret_cli.runtime.errors import DATA, SretError
from sret_cli.spec.run import HANDLING, Row
from sret_cli.study.axes import run_labels
from sret_cli.study.file import Study, load_study
from sret_cli.study.rows import PLACES, planned_row

IGNORED = {*PLACES, *(f"train.{field}" for field in HANDLING)}


@dataclass(frozen=True)
class Plan:
    """The rows of a study file's runs, other rows of the same study, and runs without a row.

    Attributes:
        rows: rows of the file's runs, with the role that the file gives them.
        others: rows of runs that the file does not have (any more).
        missing: labels of the file's runs that have no row.
    """

    rows: list[Row]
    others: list[Row]
    missing: list[str]


def match_rows(path: Path, rows: Sequence[Row]) -> Plan:
    """Matches rows with the runs of a study file by their settings; data need not exist.

    A run is matched whatever images it read. If the data of the study do not exist, its runs are
    not known, and all rows are taken.

    Raises:
        SretError: the study file is not valid.
    """
    study = load_planned(path, rows)
    if study is None:
        return Plan(list(rows), [], [])
    runs = [replace(run, contents=None) for run in study.runs]
    planned = [planned_row(run) for run in runs]
    by_key = dict(zip(map(settings_key, planned), runs, strict=True))
    ids: dict[str, str] = {settings_key(row): row["run_id"] for row in rows}
    found, others = [], []
    for row in rows:
        run = by_key.get(settings_key(row))
        if run is None:
            others.append(row)
            continue
        sources = [
            settings_key(planned_row(replace(source, contents=None))) for source in run.twin_of
        ]
        twin_of = " ".join(ids[key] for key in sources if key in ids) or None
        found.append({**row, "role": run.role, "twin_of": twin_of})
    done = {settings_key(row) for row in found}
    labels = run_labels(planned)
    missing = [
        label for label, row in zip(labels, planned, strict=True) if settings_key(row) not in done
    ]
    return Plan(found, others, missing)


def load_planned(path: Path, rows: Sequence[Row]) -> Study | None:
    """A study whose data need not exist, or whose place a flag gave: rows tell what of them counts.

    Args:
        path: the study file.
        rows: rows of some of its runs.

    Returns:
        The study, or None if its runs cannot be known without the data.

    Raises:
        SretError: the study file is not valid.
    """
    for row in rows:
        classes = row.get("model.num_classes")
        place = row.get("train.data_dir")
        if isinstance(classes, int):
            in_file = "data_dir" in path.read_text(encoding="utf-8", errors="replace")
            flags = {"data_dir": place} if place and not in_file else {}
            return load_study(path, flags, known_classes=classes)
    try:
        return load_study(path)
    except SretError as error:
        if error.code == DATA or "--data-dir" in str(error):
            return None
        raise


def settings_key(row: Row) -> str:
    """What a run does but for the contents of its images, as text that is equal for equal runs."""
    settings = {
        key: value
        for key, value in row.items()
        if key.startswith(("model.", "train.")) and key not in IGNORED
    }
    return json.dumps([settings, row.get("continues")], sort_keys=True, default=list)
