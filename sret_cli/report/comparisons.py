"""Shared models against their twins and baselines, paired by seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sret_cli.report.columns import COLUMNS, heading
from sret_cli.report.groups import SEED, Group, group_seeds, role_of, setting
from sret_cli.report.intervals import CAPTIONS, Spread, spread
from sret_cli.report.summary import ROLES, field_text, field_value, identity_fields, order
from sret_cli.report.table import NOTHING, Cell, ReportTable
from sret_cli.spec.run import BASELINE, SHARED, Row

HEADINGS = (
    *("Against", "Layers", "Their layers", "Seeds"),
    *("Δ top-1 (points)", "Δ test loss", "Params ratio", "FLOPs ratio"),
)
COLUMN_NAMES = (
    *("against", "layers", "control_layers", "seeds"),
    *("top1_percent_difference", "test_loss_difference", "params_ratio", "macs_ratio"),
)
DIFFERENCES = "Differences are shared minus control, seed by seed"
BOLD = "Bold: the interval excludes 0."


@dataclass(frozen=True)
class Comparison:
    """A shared model against one control: differences are shared minus control, seed by seed.

    Attributes:
        shared: the group of the shared model.
        control: the group of the twin or baseline.
        top1: difference in top-1 accuracy, in points.
        loss: difference in test loss.
        params_ratio: parameters of the shared model over those of the control.
        macs_ratio: likewise of multiply-adds.
    """

    shared: Group
    control: Group
    top1: Spread
    loss: Spread
    params_ratio: float | None
    macs_ratio: float | None


def compare(rows: Sequence[Row], interval: str = "ci95") -> list[Comparison]:
    """All comparisons that rows allow: a run with its twins, and with baselines of its training.

    A pair has one seed and results on both sides. Runs that failed are in no pair.
    """
    done = [row for row in rows if row.get("top1_percent") is not None and not row.get("error")]
    groups = group_seeds(done)
    group_of = {id(row): group for group in groups for row in group.rows}
    pairs: dict[tuple[int, int], list[tuple[Row, Row]]] = {}
    controls = _Controls(done)
    for shared in done:
        for control in controls.of(shared) if role_of(shared) == SHARED else ():
            key = id(group_of[id(shared)]), id(group_of[id(control)])
            pairs.setdefault(key, []).append((shared, control))
    by_id = {id(group): group for group in groups}
    return [
        Comparison(
            shared=by_id[first],
            control=by_id[second],
            top1=_difference(found, "top1_percent", interval),
            loss=_difference(found, "test_loss", interval),
            params_ratio=_ratio(found[0], "params"),
            macs_ratio=_ratio(found[0], "macs"),
        )
        for (first, second), found in pairs.items()
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> ReportTable:
    """The table of comparisons; differences whose interval excludes 0 are bold."""
    fields = identity_fields([c.shared.first for c in comparisons])
    fields = [field for field in fields if field not in ("role", "layers")]
    lines = []
    for c in sorted(comparisons, key=lambda c: _place(c, fields)):
        line = [Cell(field_text(c.shared.first, f), field_value(c.shared.first, f)) for f in fields]
        line.append(_control_cell(c.control))
        line += [_layers_cell(group) for group in (c.shared, c.control)]
        line.append(Cell(str(c.top1.n), c.top1.n))
        line += [_difference_cell(c.top1, "top1_percent"), _difference_cell(c.loss, "test_loss")]
        line += [_ratio_cell(ratio) for ratio in (c.params_ratio, c.macs_ratio)]
        lines.append(tuple(line))
    controls = [line[len(fields)].text for line in lines]
    table = ReportTable(
        title="Shared models against their controls",
        columns=(*fields, *COLUMN_NAMES),
        headings=(*map(heading, fields), *HEADINGS),
        lines=tuple(lines),
        notes=(f"{DIFFERENCES}; {CAPTIONS['ci95']}. {BOLD}",),
        blocks=tuple(i for i in range(1, len(lines)) if controls[i] != controls[i - 1]),
        identity=len(fields) + 3,
    )
    theirs = table.columns.index("control_layers")
    if all(line[theirs].value in (None, line[theirs - 1].value) for line in lines):
        table = table.without([theirs])
    for column in ("seeds", "params_ratio", "macs_ratio"):  # the same in all lines: into the note
        index = table.columns.index(column)
        texts = {line[index].text for line in table.lines}
        if len(table.lines) > 1 and len(texts) == 1:
            table = table.without([index], f"{table.headings[index]}: {texts.pop()}")
    return table


def _place(found: Comparison, fields: Sequence[str]) -> tuple[Any, ...]:
    """What comparisons are sorted by: kind of control, then the fields of the shared model."""
    control, shared = found.control.first, found.shared.first
    values = [order(field_value(shared, field)) for field in (*fields, "layers")]
    name = str(control.get("name")) if role_of(control) == BASELINE else ""
    return ROLES.index(role_of(control)), name, values, order(control.get("layers"))


def _control_cell(control: Group) -> Cell:
    """The role of a control, or its name if it is a baseline."""
    role = role_of(control.first)
    if role == BASELINE:
        role = str(control.first.get("name") or role)
    return Cell(role, role)


def _difference_cell(found: Spread, column: str) -> Cell:
    return Cell(
        text=COLUMNS[column].difference(found.mean, found.half_width),
        value=found.mean,
        half_width=found.half_width,
        n=found.n,
        bold=excludes_zero(found),
    )


def _ratio_cell(ratio: float | None) -> Cell:
    return Cell(NOTHING) if ratio is None else Cell(f"{ratio:.2f}", ratio)


def _layers_cell(group: Group) -> Cell:
    layers = group.first.get("layers")
    return Cell(NOTHING) if layers is None else Cell(f"{layers:,}", layers)


def excludes_zero(found: Spread) -> bool:
    """Whether a difference is clear of 0 by its interval; one seed never is."""
    return found.half_width is not None and abs(found.mean) > found.half_width


class _Controls:
    """The twins and baselines among some rows, by what they are compared with."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.twins: dict[str, list[Row]] = {}
        self.baselines: dict[str, list[Row]] = {}
        for row in rows:
            for run_id in str(row.get("twin_of") or "").split():
                self.twins.setdefault(run_id, []).append(row)
            if role_of(row) == BASELINE:
                self.baselines.setdefault(self._place(row), []).append(row)

    def of(self, shared: Row) -> list[Row]:
        """The twins of a shared model, and the baselines of the same study, training and seed."""
        twins = self.twins.get(str(shared.get("run_id")), ())
        same = [row for row in twins if row.get("study") == shared.get("study")]
        same = [row for row in same if row.get(SEED) == shared.get(SEED)]
        return [*same, *self.baselines.get(self._place(shared), ())] if self.baselines else same

    def _place(self, row: Row) -> str:
        return f"{row.get('study')!r} {row.get(SEED)!r} {_training(row)}"


def _training(row: Row) -> str:
    training = {key: value for key, value in row.items() if not key.startswith("model.")}
    return setting({**training, "role": SHARED, "name": None})


def _difference(pairs: Sequence[tuple[Row, Row]], column: str, interval: str) -> Spread:
    values = [a[column] - b[column] for a, b in pairs]
    assert len({a.get(SEED) for a, _ in pairs}) == len(pairs), "a seed is in two pairs"
    return spread(values, interval)


def _ratio(pair: tuple[Row, Row], column: str) -> float | None:
    ours, theirs = (row.get(column) for row in pair)
    return ours / theirs if ours and theirs else None
