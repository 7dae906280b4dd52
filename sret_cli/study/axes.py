"""The fields in which the runs of a study differ, and their values as short texts."""

from collections.abc import Sequence
from typing import Any

from sret_cli.spec.contents import CONTENTS_OF
from sret_cli.spec.run import Row


def format_value(value: Any) -> str:
    """The value of a spec field as short text: a tuple as 8-4-1, None as a dash.

    Different numbers have different texts: a number is only rounded if nothing is lost.
    """
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def number_of(row: Row, column: str) -> float | None:
    """A column of a row as a number, also if all stages have the same one; None for others."""
    value = row.get(column)
    if isinstance(value, list | tuple) and value and len(set(map(str, value))) == 1:
        value = value[0]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def varying_fields(rows: Sequence[Row]) -> list[str]:
    """The fields besides the seed in which rows differ: spec fields, `study` and `name`.

    A field is left out if it follows from the name, or from a column that every table shows, as
    the recursions follow from the layers.
    """
    keys = dict.fromkeys(k for row in rows for k in row if k.startswith(("model.", "train.")))
    differ = [
        found
        for key in ("study", "name", *keys)
        if (found := _telling(rows, key))
        and len({format_value(row.get(found)) for row in rows}) > 1
    ]
    for known in ("study", "name", "model.slices", "layers"):
        if known in differ or known == "layers":
            follows = {f for f in differ if f != known and _follows(rows, known, f)}
            if known in ("model.slices", "layers"):
                follows &= {"model.recursive_slices", "model.recursions"}
            differ = [field for field in differ if field not in follows]
    return differ


def _telling(rows: Sequence[Row], key: str) -> str | None:
    """The field that distinguishes rows in place of `key`: for a path the hash of its contents.

    The path itself is used where it distinguishes the same rows, because people can read it. Images
    are compared by sampled bytes only between rows with the same seed, which chooses the sample.
    """
    place = key.removeprefix("train.")
    if key == "train.seed" or place not in CONTENTS_OF:
        return None if key == "train.seed" else key
    sums = [name for name in CONTENTS_OF[place] if any(row.get(name) for row in rows)]
    if place == "data_dir":
        known = [tuple(row.get(k) for k in ("train.seed", *CONTENTS_OF[place])) for row in rows]
        sums = sums[: 1 if len(set(known)) == len({values[:2] for values in known}) else 2]
    if not sums or (_follows(rows, key, sums[-1]) and _follows(rows, sums[-1], key)):
        return key
    return sums[-1]


def _follows(rows: Sequence[Row], known: str, field: str) -> bool:
    pairs = {(format_value(row.get(known)), format_value(row.get(field))) for row in rows}
    return len(pairs) == len({first for first, _ in pairs})


def run_labels(rows: Sequence[Row]) -> list[str]:
    """A label for each run of a study: id, name, layers, seed, and the fields that vary.

    Args:
        rows: the rows of all runs of the study; they need no measurements.
    """
    short = {
        field: _short(rows, field)
        for field in varying_fields(rows)
        if field not in ("study", "name")
    }
    labels = []
    for row in rows:
        parts = [f"{row.get('run_id') or ''} {row.get('name') or ''}".strip()]
        parts += [f"{row['layers']} layers"] if row.get("layers") is not None else []
        parts += [f"seed {row['train.seed']}"] if "train.seed" in row else []
        parts += [
            f"{field.rpartition('.')[2]} {texts[format_value(row[field])]}"
            for field, texts in short.items()
            if field in row
        ]
        labels.append(", ".join(parts))
    return labels


def _short(rows: Sequence[Row], field: str) -> dict[str, str]:
    """Short texts for a field's values: the last parts of paths, if these differ."""
    values = {format_value(row.get(field)) for row in rows}
    last = {value: value.rpartition("/")[2] for value in values}
    return last if len(set(last.values())) == len(values) else {value: value for value in values}
