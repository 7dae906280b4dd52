"""The table of what runs measured: one line a setting, with means over its seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

from sret_cli.cost.budget import TWIN_KINDS
from sret_cli.report.columns import ACCURACIES, COLUMNS, FLOPS_NOTE, VARYING, Column, heading
from sret_cli.report.groups import DEPENDENT, SEED, Group, group_seeds, role_of
from sret_cli.report.intervals import CAPTIONS, spread, wilson
from sret_cli.report.table import NOTHING, Cell, ReportTable
from sret_cli.spec.run import BASELINE, SHARED, Row, twin_role
from sret_cli.study.axes import format_value, varying_fields
from sret_cli.study.view import ReportSpec

ROLES = (SHARED, *map(twin_role, TWIN_KINDS), BASELINE)
TRAINED = ("params", "macs", "top1_percent")
PROFILED = ("params", "macs", "activations", "peak_memory_bytes", "step_seconds")
SHOWN_FAILURES = 5  # failed or missing runs that a note names
CONSTANT = ("params", "macs", "activations", "activation_bytes", "test_images", "epochs_trained")


def summarise(
    rows: Sequence[Row],
    spec: ReportSpec | None = None,
    columns: Sequence[str] = (),
    title: str = "",
) -> ReportTable:
    """The table of rows; runs that differ only in their seed are one line.

    Such a line has means with their intervals over seeds, and under "Seeds" the number of runs with
    results. An accuracy of a single seed has the interval of its test images in brackets. A value
    that was not measured is a dash. Failed runs are named in a note and count for nothing. Measured
    columns that are the same in all lines go into a note as well.

    Args:
        rows: what runs measured.
        spec: what to show; by default parameters, FLOPs and top-1.
        columns: columns to show instead of the default ones, if any row has them.
        title: what the table is headed by.
    """
    spec = spec or ReportSpec()
    groups = group_seeds(rows)
    identity = identity_fields([group.first for group in groups], spec.group or ())
    groups = _sorted(groups, identity, spec.sort)
    chosen = spec.columns or columns or _default_columns(rows)
    measured = [c for c in chosen if c not in identity]
    measured = [c for c in measured if spec.columns or any(_has(row, c) for row in rows)]
    lines = [[_field_cell(group.first, field) for field in identity] for group in groups]
    cells = {c: [_cell(group, c, spec.interval) for group in groups] for c in measured}
    constant = [c for c in measured if c in CONSTANT and not spec.columns and _same(cells[c])]
    shown = [c for c in measured if c not in constant]
    seeds = any(len(group.rows) > 1 for group in groups)
    for index, (line, group) in enumerate(zip(lines, groups, strict=True)):
        if seeds:
            count = sum(not row.get("error") for row in group.rows)
            line.append(Cell(str(count), count))
        line += [cells[column][index] for column in shown]
    names = [*identity, *["seeds"] * seeds, *shown]
    notes = _notes(rows, groups, identity, spec.interval, {c: cells[c][0].text for c in constant})
    roles = [role_of(group.first) for group in groups]
    return ReportTable(
        title=title,
        columns=tuple(names),
        headings=tuple("Seeds" if name == "seeds" else heading(name) for name in names),
        lines=tuple(map(tuple, lines)),
        notes=tuple(notes),
        blocks=tuple(i for i in range(1, len(roles)) if roles[i] != roles[i - 1]),
        identity=len(identity),
    )


def identity_fields(rows: Sequence[Row], first: Sequence[str] = ()) -> list[str]:
    """The fields that tell the lines of a table apart, those of `first` in front.

    These are study, name, role and layers, and the fields of the spec that vary and do not follow
    from them.
    """
    fields = [f for f in ("study", "name", "role", "layers") if _differ(rows, f)]
    spec_fields = [f for f in varying_fields(rows) if f not in ("study", "name")]
    known = [f for f in fields if f != "layers"]
    for field in spec_fields:
        follows = _follow(rows, known, field)
        follows |= field in DEPENDENT and _follow(rows, fields, field)
        if not follows:
            fields.insert(-1 if fields[-1:] == ["layers"] else len(fields), field)
    if not fields:
        is_one = len(rows) == 1 and rows[0].get("layers") is not None
        fields = ["name", "layers"] if is_one else ["name"]
    return list(dict.fromkeys((*first, *fields)))


def field_value(row: Row, field: str) -> Any:
    """The value of a field that identifies a line, such as the name without "twin layers"."""
    if field == "role":
        return role_of(row)
    if field == "name":
        return str(row.get("name") or "").removesuffix(f" {role_of(row)}")
    value = row.get(field)
    return tuple(value) if isinstance(value, list) else value


def field_text(row: Row, field: str) -> str:
    """The value of a field of a row, as tables and legends show it.

    A value for each stage is folded into one where all stages have the same.
    """
    value = field_value(row, field)
    if isinstance(value, tuple) and value and len(set(value)) == 1:
        value = value[0]
    if field == "layers" and isinstance(value, int):
        return f"{value:,}"
    return format_value(value)


def _field_cell(row: Row, field: str) -> Cell:
    value = field_value(row, field)
    return Cell(field_text(row, field), value)


def _differ(rows: Sequence[Row], field: str) -> bool:
    return len({format_value(field_value(row, field)) for row in rows}) > 1


def _follow(rows: Sequence[Row], known: Sequence[str], field: str) -> bool:
    """Whether the known fields of a row tell the value of another."""
    pairs = {
        (tuple(format_value(field_value(r, k)) for k in known), format_value(r.get(field)))
        for r in rows
    }
    return len(pairs) == len({first for first, _ in pairs})


def _default_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    return TRAINED if any(_has(row, "top1_percent") for row in rows) else PROFILED


def _has(row: Row, column: str) -> bool:
    return row.get(column) is not None


def _same(cells: Sequence[Cell]) -> bool:
    return len(cells) > 1 and len({cell.value for cell in cells}) == 1


def _sorted(groups: Sequence[Group], identity: Sequence[str], keys: Sequence[str]) -> list[Group]:
    """Groups in blocks of one study and role, in them by chosen columns and then by identity."""
    ordered = sorted(
        groups, key=lambda group: [order(field_value(group.first, f)) for f in identity]
    )
    for key in reversed(keys):
        name, down = key.removeprefix("-"), key.startswith("-")
        known = [g for g in ordered if _sort_value(g, name) is not None]
        unknown = [g for g in ordered if _sort_value(g, name) is None]
        known.sort(key=lambda group: order(_sort_value(group, name)), reverse=down)
        ordered = [*known, *unknown]
    return sorted(
        ordered,
        key=lambda g: (str(g.first.get("study") or ""), ROLES.index(role_of(g.first))),
    )


def _sort_value(group: Group, column: str) -> Any:
    if column in VARYING:
        values = group.values(column)
        return statistics.fmean(values) if values else None
    return field_value(group.first, column)


def order(value: Any) -> tuple[Any, ...]:
    """A key that puts numbers before texts, and both before what is not known."""
    if isinstance(value, tuple):
        return (0, *map(order, value))
    if value is None:
        return (2,)
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _cell(group: Group, column: str, interval: str) -> Cell:
    values = group.values(column)
    if not values:
        return Cell(NOTHING)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return _field_cell(group.first, column)
    found = COLUMNS.get(column)
    if found is None:
        texts = dict.fromkeys(map(format_value, values))
        return Cell(", ".join(texts), values[0])
    if column not in VARYING:
        mean = statistics.fmean(values)
        value = values[0] if len(set(values)) == 1 else mean
        return Cell(found.text(mean), value)
    mean, half_width, n = spread(values, interval)
    if n == 1:
        return _single(group, column, found, mean, interval)
    return Cell(found.text(mean, half_width), mean, half_width=half_width, n=n)


def _single(group: Group, column: str, found: Column, value: float, interval: str) -> Cell:
    (quartiles,) = group.values(f"{column}_iqr") or (None,)
    if quartiles is not None:
        return Cell(found.text(value), value, interval_text=f"(IQR {found.text(quartiles)})")
    images = next((row.get("test_images") for row in group.rows if _has(row, column)), None)
    if column not in ACCURACIES or not images or interval != "ci95":
        return Cell(found.text(value), value, n=1)
    ends = wilson(value, images)
    text = f"[{', '.join(map(found.text, ends))}]"
    return Cell(found.text(value), value, interval=ends, interval_text=text, n=1)


def _notes(
    rows: Sequence[Row],
    groups: Sequence[Group],
    identity: Sequence[str],
    interval: str,
    constant: dict[str, str],
) -> list[str]:
    """Sentences under a table: what is the same in all lines, intervals, seeds, failed runs."""
    same = [f"{heading(column)}: {text}" for column, text in constant.items()]
    if "name" not in identity and groups:
        same.insert(0, f"{heading('name')}: {field_text(groups[0].first, 'name')}")
    if "layers" not in identity and len(groups) > 1 and _has(groups[0].first, "layers"):
        same.append(f"Layers: {field_text(groups[0].first, 'layers')}")
    notes = ["; ".join(same)] if same else []
    notes += [seeds_note(rows, interval)]
    notes += [failures_note(rows)]
    notes += [FLOPS_NOTE] if any(_has(row, "macs") for row in rows) else []
    return [note for note in notes if note]


def seeds_note(rows: Sequence[Row], interval: str = "ci95") -> str:
    """What the intervals of a table with measurements are, and how many seeds are behind them."""
    groups = group_seeds([row for row in rows if row.get("top1_percent") is not None])
    counts = sorted({len(group.rows) for group in groups})
    notes = []
    if counts and counts[-1] > 1:
        numbers = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        seeds = sorted({row[SEED] for group in groups for row in group.rows})
        listed = f" ({', '.join(map(str, seeds))})" if len(seeds) <= 10 else ""
        notes.append(f"{CAPTIONS[interval]}, {numbers} seeds{listed}")
    if counts and counts[0] == 1 and interval == "ci95":
        notes.append("[…]: 95 % interval of one run's test images (Wilson)")
    return "; ".join(notes)


def failures_note(rows: Sequence[Row]) -> str:
    """Which runs failed, and why; the first five."""
    failed = [row for row in rows if row.get("error")]
    if not failed:
        return ""
    texts = [f"{short_label(row)}: {row['error']}" for row in failed[:SHOWN_FAILURES]]
    more = f"; and {len(failed) - SHOWN_FAILURES} more" * (len(failed) > SHOWN_FAILURES)
    return f"{len(failed)} of {len(rows)} runs failed: {'; '.join(texts)}{more}"


def short_label(row: Row) -> str:
    """Name, layers, seed and id of a run."""
    parts = [str(row.get("name") or "")]
    parts += [f"{row['layers']:,} layers"] if isinstance(row.get("layers"), int) else []
    parts += [f"seed {row[SEED]}"] if row.get(SEED) is not None else []
    return f"{', '.join(parts)} ({row.get('run_id')})"
