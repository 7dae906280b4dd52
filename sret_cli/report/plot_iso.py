"""Models of equal parameters over their FLOPs, and models of equal FLOPs over their parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sret_cli.report.columns import FLOPS_NOTE, heading
from sret_cli.report.groups import Group, group_seeds, role_of, series_fields
from sret_cli.report.plot_axes import number_in, number_text, set_x_axis, set_y_axis
from sret_cli.report.plot_intervals import Intervals
from sret_cli.report.plot_labels import Label, place_labels
from sret_cli.report.plot_lines import (
    draw_series,
    drawable,
    mean_of,
    sentence,
    tested_images,
    words_for,
)
from sret_cli.report.plot_panels import (
    How,
    add_legend,
    drawing,
    entry,
    finish,
    label_panels,
    make_panels,
    note_entry,
)
from sret_cli.report.plot_series import MOST_PANELS, Series, panel_keys
from sret_cli.report.plot_style import (
    DASHES,
    GREY,
    MOST_SERIES,
    ROLE_LOOKS,
    Look,
    short_labels,
)
from sret_cli.spec.run import Row

TOLERANCE = 1.02  # largest over smallest cost of models that count as equal
# Fields that set the size of a model; lines of equal cost join models that differ in them.
SIZES = {"name", "role", "layers"} | {
    f"model.{field}"
    for field in ("recursions", "order", "blocks", "embed_dims", "num_heads", "share", "backbone")
}


@dataclass(frozen=True)
class Level:
    """Models of equal cost: their mean cost in its unit, and their settings by x."""

    cost: float
    groups: tuple[Group, ...]


def level_costs(groups: Sequence[Group], fixed: str) -> dict[int, float]:
    """The level of each group by its id: the mean cost of all groups that count as equal."""
    costs = [(number_in(group.first, fixed), group) for group in groups]
    found: list[list[tuple[float, Group]]] = []
    for cost, group in sorted(((c, g) for c, g in costs if c), key=lambda item: item[0]):
        if found and found[-1][0][0] * TOLERANCE >= cost > 0:
            found[-1].append((cost, group))
        else:
            found.append([(cost, group)])
    return {
        id(group): sum(cost for cost, _ in members) / len(members)
        for members in found
        for _, group in members
    }


def iso_panels(rows: Sequence[Row], fixed: str, x: str, y: str) -> list[tuple[str, list[Level]]]:
    """The levels on which models differ in x, by the fields besides size, each with its title."""
    usable = [row for row in drawable(rows, x, y) if number_in(row, fixed) is not None]
    groups = group_seeds(usable)
    cost_of = level_costs(groups, fixed)
    fields = [f for f in series_fields(groups, "layers") if f not in SIZES]
    made = []
    for texts, members in panel_keys(groups, fields):
        title = ", ".join(f"{heading(f)}: {t}" for f, t in zip(fields, texts, strict=True))
        levels: dict[float, list[Group]] = {}
        for group in sorted(members, key=lambda g: number_in(g.first, x) or 0.0):
            if id(group) in cost_of:
                levels.setdefault(cost_of[id(group)], []).append(group)
        kept = [
            Level(cost, tuple(level))
            for cost, level in sorted(levels.items())
            if len({number_in(group.first, x) for group in level}) > 1
        ]
        if kept:
            made.append((short_labels([title], 60)[0], kept))
    return made


def draw_iso(rows: Sequence[Row], fixed: str, x: str, y: str, how: How) -> tuple[Figure, str]:
    """A line for each level of a cost, over the other cost; colours and markers are roles."""
    every = iso_panels(rows, fixed, x, y)
    shown = every[:MOST_PANELS]
    costs = sorted({level.cost for _, levels in shown for level in levels})
    notes = [f"{len(every) - len(shown)} panels are left out."] * (len(every) > len(shown))
    if len(costs) > MOST_SERIES:  # evenly chosen, with the smallest and the largest
        chosen = {
            costs[round(i * (len(costs) - 1) / (MOST_SERIES - 1))] for i in range(MOST_SERIES)
        }
        notes.append(f"{len(chosen)} of {len(costs)} levels are shown.")
        costs = sorted(chosen)
    unit = heading(fixed).partition("(")[2].rstrip(")")
    dashes = dict(zip(costs, DASHES, strict=False))
    intervals = Intervals(how.interval, y)
    drawn: list[Group] = []
    with drawing():
        figure, panels = make_panels(len(shown), how.width, share_y=True, share_x=True)
        for axes, (title, levels) in zip(panels, shown, strict=True):
            axes.set_title(title)
            for level in (level for level in levels if level.cost in dashes):
                _draw_lines(axes, _means(level, x, y, how.interval), dashes[level.cost])
                for group in level.groups:
                    series = Series("", _look_of(role_of(group.first)), (group,))
                    draw_series(axes, series, x, y, how, intervals)
                    drawn.append(group)
        rows_drawn = [row for group in drawn for row in group.rows]
        values = [n for row in rows_drawn if (n := number_in(row, y)) is not None]
        places = [n for row in rows_drawn if (n := number_in(row, x)) is not None]
        for axes in panels:
            set_x_axis(axes, places, x)
        set_y_axis(panels[0], y, values, intervals.ends, tested_images(rows_drawn))
        intervals.draw_bars(alpha=0.5)
        label_panels(panels, heading(x), heading(y))
        entries = [
            Line2D([], [], color=GREY, linestyle=dash, label=_short(cost, unit))
            for cost, dash in dashes.items()
        ]
        roles = list(dict.fromkeys(role_of(group.first) for group in drawn))
        if len(roles) > 1:
            entries += [entry(role, _look_of(role), False) for role in roles]
        entries.append(note_entry("numbers: layers"))
        add_legend(figure, entries, sentence(words_for(fixed)))
        finish(figure)
        for axes, (_, levels) in zip(panels, shown, strict=True):
            points = [
                point
                for level in levels
                if level.cost in dashes
                for point in _means(level, x, y, how.interval)
            ]
            labels = [
                Label(place, mean, number_text(layers), GREY)
                for place, mean, group in points
                if (layers := number_in(group.first, "layers")) is not None
            ]
            place_labels(figure, axes, labels, [point[:2] for point in points])
    parts = [
        f"{sentence(words_for(y))} over {words_for(x)}; a line joins models whose "
        f"{words_for(fixed)} are within 2 % of each other. Numbers at points are layers.",
        intervals.text(drawn),
        FLOPS_NOTE,
        *notes,
    ]
    return figure, " ".join(part for part in parts if part)


def _look_of(role: str) -> Look:
    return ROLE_LOOKS.get(role) or Look(GREY, "o", "-")


def _short(cost: float, unit: str) -> str:
    if unit == "G" and cost < 0.1:
        cost, unit = 1000 * cost, "M"
    return f"{number_text(float(f'{cost:.3g}'))} {unit}"


def _means(level: Level, x: str, y: str, interval: str) -> list[tuple[float, float, Group]]:
    return [
        (place, found[0], group)
        for group in level.groups
        if (place := number_in(group.first, x)) is not None
        and (found := mean_of(group, y, interval)) is not None
    ]


def _draw_lines(axes: Axes, every: Sequence[tuple[float, float, Group]], dash: Any) -> None:
    """Joins the models of each role of a level, or all where roles have one model each.

    A line within a role has its colour. Nothing is joined where two models stand at one place.
    """
    by_role: dict[str, list[tuple[float, float, Group]]] = {}
    for point in every:
        by_role.setdefault(role_of(point[2].first), []).append(point)
    is_one_each = all(len(points) == 1 for points in by_role.values())
    for points in [list(every)] if is_one_each else by_role.values():
        if len({place for place, _, _ in points}) < len(points):
            continue
        roles = {role_of(group.first) for _, _, group in points}
        axes.plot(
            [place for place, _, _ in points],
            [mean for _, mean, _ in points],
            color=_look_of(roles.pop()).color if len(roles) == 1 else GREY,
            linestyle=dash,
            linewidth=0.9,
            zorder=2,
        )
