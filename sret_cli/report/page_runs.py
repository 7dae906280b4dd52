"""What a page says about each run: results, settings, provenance and the command to train it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sret_cli.report.columns import COLUMNS, heading
from sret_cli.report.groups import DEPENDENT, SEED, role_of
from sret_cli.report.page_curves import run_curves
from sret_cli.report.page_tables import first_number, is_number
from sret_cli.spec.run import Row, flat
from sret_cli.study.axes import format_value
from sret_cli.study.rows import MEASUREMENTS
from sret_cli.study.train_command import train_command

Pair = tuple[str, str]
NOT_NAMED = "unnamed"
INDEX = ("params", "macs", "top1_percent", "test_loss", "train_seconds")
PROVENANCE = {
    "sret_version": "sret",
    "torch_version": "torch",
    "python_version": "Python",
    "device_name": "Device",
    "world_size": "Processes",
    "measured_device_name": "Device of the measurements",
    "git_commit": "Commit",
    "started_at": "Started",
    "data_files_sha256": "SHA-256 of the list of images",
    "data_sample_sha256": "SHA-256 of sampled images",
    "continues": "Continues the run",
    "twin_of": "Control of the runs",
}


@dataclass(frozen=True)
class RunDetails:
    """One run as the page shows it.

    Attributes:
        anchor: its id in the page.
        run_id: the id of the run.
        name: the name of its model.
        facts: what tells it apart in few words: role, layers, seed, and fields that differ.
        telling: those fields, with their values.
        accuracy: its top-1, or an empty text.
        error: why it failed, or an empty text.
        results: headings and measurements.
        settings: settings in which runs differ.
        rest: number of the table of settings that it has in common with others.
        provenance: versions, device, commit and times.
        command: the command that trains it alone, or None if there is none.
        curves: its learning curves as SVG.
    """

    anchor: str
    run_id: str
    name: str
    facts: tuple[str, ...]
    telling: tuple[Pair, ...]
    accuracy: str
    error: str
    results: tuple[Pair, ...]
    settings: tuple[Pair, ...]
    rest: int
    provenance: tuple[Pair, ...]
    command: str | None
    curves: tuple[str, ...]

    @property
    def tip(self) -> str:
        """What the tooltip of its points says."""
        accuracy = f": top-1 {self.accuracy}" if self.accuracy else ""
        return f"{', '.join((self.name, *self.facts))}{accuracy} (run {self.run_id})"


@dataclass(frozen=True)
class CommonSettings:
    """Settings with one value in all runs that have them: of runs with the same fields."""

    pairs: tuple[Pair, ...]
    runs: int


def describe_runs(
    runs: Sequence[tuple[Row, Mapping[str, Any] | None, Sequence[Mapping[str, Any]]]],
) -> tuple[list[RunDetails], list[CommonSettings]]:
    """What the page says about each run, and the settings that runs have in common.

    Args:
        runs: row, `config.json` and lines of `metrics.jsonl` of each run.
    """
    settings = [_settings(row, config) for row, config, _ in runs]
    differing = _differing(settings)
    telling = _telling([row for row, _, _ in runs], settings, differing)
    common: dict[tuple[Pair, ...], int] = {}
    anchors = _anchors([str(row.get("run_id") or "") for row, _, _ in runs])
    found = []
    for anchor, texts, (row, config, metrics) in zip(anchors, settings, runs, strict=True):
        rest = tuple((k, v) for k, v in texts.items() if k not in differing)
        common[rest] = common.get(rest, 0) + 1
        layers = row.get("layers")
        facts = [role_of(row)]
        facts += [f"{layers:,} layers"] if isinstance(layers, int) else []
        facts += [f"seed {row[SEED]}"] if row.get(SEED) is not None else []
        fields = tuple((key, texts.get(key, "–")) for key in telling)
        facts += [f"{k.rpartition('.')[2]} {text}" for k, text in fields if text != "–"]
        found.append(
            RunDetails(
                anchor=anchor,
                run_id=one_line(row.get("run_id")),
                name=one_line(row.get("name")) or NOT_NAMED,
                facts=tuple(facts),
                telling=fields,
                accuracy=f"{_text('top1_percent', row)} %" * (row.get("top1_percent") is not None),
                error=str(row.get("error") or ""),
                results=_results(row),
                settings=tuple((k, v) for k, v in texts.items() if k in differing),
                rest=list(common).index(rest),
                provenance=_provenance(row),
                command=train_command(config or _config(row)),
                curves=tuple(run_curves(metrics)),
            )
        )
    return found, [CommonSettings(pairs, count) for pairs, count in common.items()]


def run_index(
    rows: Sequence[Row], details: Sequence[RunDetails]
) -> tuple[list[str], list[list[str]], list[list[float | str | None]]]:
    """Headings, lines and values to sort by of the table of all runs."""
    columns = [c for c in INDEX if any(row.get(c) is not None for row in rows)]
    fields = [heading(key) for key, _ in details[0].telling] if details else []
    headings = ["Run", "Model", "Role", "Layers", "Seed", *fields]
    headings += [COLUMNS[column].heading for column in columns] + ["Status"]
    lines, values = [], []
    for row, run in zip(rows, details, strict=True):
        status = one_line(row.get("status")) or ("failed" if run.error else "done")
        texts = [run.run_id, run.name, role_of(row), _text("layers", row), _seed(row)]
        values.append([*texts[:3], row.get("layers"), row.get(SEED)])
        values[-1] += [first_number(text) for _, text in run.telling]
        values[-1] += [*(row.get(column) for column in columns), status]
        texts += [text for _, text in run.telling]
        lines.append([*texts, *(_text(column, row) for column in columns), status])
    return headings, lines, values


def one_line(value: Any) -> str:
    """A text without line breaks; empty for None."""
    return "" if value is None else " ".join(str(value).split())


def _seed(row: Row) -> str:
    return "–" if row.get(SEED) is None else str(row[SEED])


def _anchors(run_ids: Sequence[str]) -> list[str]:
    """An id of the page for each run: the run's id if it is plain, and no two the same."""
    found: dict[str, None] = {}
    for run_id in run_ids:
        plain = start = "run-" + (re.sub(r"[^A-Za-z0-9_-]+", "-", run_id) or NOT_NAMED)
        number = 1
        while plain in found:
            number += 1
            plain = f"{start}-{number}"
        found[plain] = None
    return list(found)


def _settings(row: Row, config: Mapping[str, Any] | None) -> dict[str, str]:
    """All fields of the model and of the training, as texts."""
    tables = {"model": None, "train": None} if config is None else config
    fields: Row = {}
    for name in ("model", "train"):
        table = tables.get(name)
        fields |= flat(name, table) if isinstance(table, dict) else {}
    if not fields:
        fields = {key: v for key, v in row.items() if key.startswith(("model.", "train."))}
    return {one_line(key): one_line(format_value(value)) for key, value in fields.items()}


def _telling(
    rows: Sequence[Row], settings: Sequence[Mapping[str, str]], differing: set[str]
) -> list[str]:
    """The fields that tell runs apart besides name, role, layers and seed.

    A field that follows from another one is left out, and so is what follows from the depth, such
    as recursions, unless runs would look alike without it.
    """
    keys = list(dict.fromkeys(key for texts in settings for key in texts if key in differing))
    known = [(r.get("name"), role_of(r), r.get("layers"), r.get(SEED)) for r in rows]
    columns: dict[str, list[str | None]] = {}
    for key in (k for k in keys if k != SEED and k not in DEPENDENT):
        values = [texts.get(key) for texts in settings]
        if not any(len(set(c)) == len(set(zip(c, values, strict=True))) for c in columns.values()):
            columns[key] = values
    for key in (k for k in DEPENDENT if k in keys):
        values = [texts.get(key) for texts in settings]
        apart = list(zip(known, *columns.values(), strict=True))
        if len(set(zip(apart, values, strict=True))) > len(set(apart)):
            columns[key] = values
    return list(columns)


def _differing(settings: Sequence[Mapping[str, str]]) -> set[str]:
    """The fields with several values, among the runs that have the field."""
    values: dict[str, set[str]] = {}
    for texts in settings:
        for key, text in texts.items():
            values.setdefault(key, set()).add(text)
    return {key for key, found in values.items() if len(found) > 1}


def _config(row: Row) -> dict[str, Any]:
    """The config of a run, from its row."""
    tables: dict[str, Any] = {
        name: {k.removeprefix(f"{name}."): v for k, v in row.items() if k.startswith(f"{name}.")}
        for name in ("model", "train")
    }
    return {"study": row.get("study"), "continues": row.get("continues"), **tables}


def _text(column: str, row: Row) -> str:
    value = row.get(column)
    return COLUMNS[column].text(value) if is_number(value) else one_line(value) or "–"


def _results(row: Row) -> tuple[Pair, ...]:
    shown = [c for c in MEASUREMENTS if c in COLUMNS and row.get(c) is not None]
    return tuple((COLUMNS[c].heading, _text(c, row)) for c in shown)


def _provenance(row: Row) -> tuple[Pair, ...]:
    pairs = []
    for key, name in PROVENANCE.items():
        value = row.get(key)
        if value is not None:
            text = value if isinstance(value, str | int | float) else json.dumps(value, default=str)
            pairs.append((name, one_line(text)))
    seconds = row.get("train_seconds")
    if is_number(seconds):
        pairs.append(("Duration of the training", duration(seconds)))
    return tuple(pairs)


def duration(seconds: float) -> str:
    """A time as people say it: "11 s", "2 min 5 s", "1 h 1 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
