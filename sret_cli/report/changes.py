"""Two states of a study: what each run measured in the one and in the other."""

from collections.abc import Sequence

from sret_cli.report.columns import COLUMNS, heading
from sret_cli.report.summary import field_text, field_value, identity_fields, order
from sret_cli.report.table import NOTHING, Cell, ReportTable
from sret_cli.spec.run import Row

MEASURED = ("top1_percent", "test_loss")


def changes_table(
    first: Sequence[Row], second: Sequence[Row], labels: tuple[str, str]
) -> ReportTable | None:
    """What the runs measured that two sources have in common, matched by their ids.

    A difference is the second source's value minus the first's.

    Args:
        first: rows of the first source.
        second: rows of the second.
        labels: what the two sources are called.

    Returns:
        The table, or None if no run is in both.
    """
    after = {row["run_id"]: row for row in second}
    pairs = [(row, after[row["run_id"]]) for row in first if row["run_id"] in after]
    if not pairs:
        return None
    fields = [f for f in identity_fields([a for a, _ in pairs]) if f != "study"]
    fields += [f for f in ("train.seed", "run_id") if f not in fields]
    pairs.sort(key=lambda pair: [order(field_value(pair[0], f)) for f in fields])
    names = [*fields]
    headings = [_heading_of(f) for f in fields]
    for column in MEASURED:
        shown = COLUMNS[column].heading
        names += [f"{column}_{side}" for side in ("first", "second", "difference")]
        headings += [f"{shown}, {labels[0]}", f"{shown}, {labels[1]}", "Difference"]
    lines = [
        tuple(
            [Cell(field_text(a, f), field_value(a, f)) for f in fields]
            + [cell for column in MEASURED for cell in _cells(a, b, column)]
        )
        for a, b in pairs
    ]
    ids = {row["run_id"] for row in first}
    only = [len(ids - after.keys()), len(after.keys() - ids)]
    same = sum(all(a.get(c) == b.get(c) for c in MEASURED) for a, b in pairs)
    notes = [f"{len(pairs)} runs are in both; {same} of them measured exactly the same"]
    notes += [f"{n} only in {label}" for n, label in zip(only, labels, strict=True) if n]
    return ReportTable(
        title=f"{labels[0]} and {labels[1]}",
        columns=tuple(names),
        headings=tuple(headings),
        lines=tuple(lines),
        notes=("; ".join(notes),),
        identity=len(fields),
    )


def _heading_of(field: str) -> str:
    return {"run_id": "Run", "train.seed": "Seed"}.get(field) or heading(field)


def _cells(first: Row, second: Row, column: str) -> list[Cell]:
    values = [row.get(column) for row in (first, second)]
    cells = [Cell(NOTHING) if v is None else Cell(COLUMNS[column].text(v), v) for v in values]
    a, b = values
    if a is None or b is None:
        return [*cells, Cell(NOTHING)]
    return [*cells, Cell(COLUMNS[column].difference(b - a), b - a)]
