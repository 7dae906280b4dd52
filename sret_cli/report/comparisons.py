"""Shared models against their twins and baselines, paired by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

from sret_cli.report.columns import COLUMNS
from sret_cli.report.groups import SEED, Group, group_seeds, role_of, setting
from sret_cli.report.intervals import Spread, spread
from sret_cli.report.tables import field_text, table_fields
from sret_cli.spec.run import BASELINE, SHARED, Row

HEADINGS = (
    *("Against", "Layers", "Their layers", "Seeds"),
    *("Δ top-1 (points)", "Δ test loss", "Params ratio", "FLOPs ratio"),
)
COMPARISON_NOTE = (
    "Differences are shared minus control, seed by seed; ±: 95 % confidence interval of their mean "
    "(Student's t). Bold: the interval excludes 0."
)


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
    for shared in done:
        for control in done if role_of(shared) == SHARED else ():
            if _are_paired(shared, control):
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


def comparison_cells(
    comparisons: Sequence[Comparison], bold: str = "{}"
) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table of comparisons.

    Args:
        comparisons: what to show.
        bold: a template such as "**{}**" for differences whose interval excludes 0.
    """
    fields = table_fields([c.shared.first for c in comparisons])
    fields = [field for field in fields if field not in ("role", "layers")]
    lines = []
    for c in comparisons:
        line = [field_text(c.shared.first, field) for field in fields]
        line += [role_of(c.control.first), *(_layers(g.first) for g in (c.shared, c.control))]
        line.append(str(c.top1.n))
        for column, found in (("top1_percent", c.top1), ("test_loss", c.loss)):
            text = COLUMNS[column].text(found.mean, found.half_width)
            text = text if text.startswith("-") else f"+{text}"
            line.append(bold.format(text) if excludes_zero(found) else text)
        line += ["–" if r is None else f"{r:.2f}" for r in (c.params_ratio, c.macs_ratio)]
        lines.append(line)
    return ["Model" if f == "name" else f.partition(".")[2] or f for f in fields] + [
        *HEADINGS
    ], lines


def excludes_zero(found: Spread) -> bool:
    """Whether a difference is clear of 0 by its interval; one seed never is."""
    return found.half_width is not None and abs(found.mean) > found.half_width


def _are_paired(shared: Row, control: Row) -> bool:
    if shared.get("study") != control.get("study") or shared.get(SEED) != control.get(SEED):
        return False
    if str(shared.get("run_id")) in str(control.get("twin_of") or "").split():
        return True
    return role_of(control) == BASELINE and _training(shared) == _training(control)


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


def _layers(row: Row) -> str:
    return "–" if row.get("layers") is None else f"{row['layers']:,}"
