"""Lines over depth or another column: accuracy, loss and cost."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sret_cli.report.columns import FLOPS_NOTE, VARYING, heading
from sret_cli.report.groups import Group, group_seeds, role_of
from sret_cli.report.intervals import spread
from sret_cli.report.plot_axes import number_in, set_x_axis
from sret_cli.report.plot_intervals import Bar, Intervals
from sret_cli.report.plot_panels import (
    How,
    add_legend,
    draw_runs,
    drawing,
    entry,
    finish,
    label_panels,
    make_panels,
)
from sret_cli.report.plot_series import Arrangement, Series, arrange
from sret_cli.report.plot_style import DASHES, nominal_looks, short_labels
from sret_cli.spec.run import BASELINE, Row

MOST_LEVELS = 3  # horizontal lines

# Columns within a sentence, where that is not their heading.
WORDS = {
    "params": "parameters",
    "activation_bytes": "memory kept for the backward pass",
    "step_seconds": "time of a training step",
    "forward_seconds": "time of a forward pass",
    "top1_percent": "top-1 accuracy",
    "top5_percent": "top-5 accuracy",
}


def drawable(rows: Sequence[Row], x: str, y: str) -> list[Row]:
    """The rows that have a finite number for each axis."""
    return [r for r in rows if number_in(r, x) is not None and number_in(r, y) is not None]


def words_for(column: str) -> str:
    """What a column is called within a sentence: "parameters" for `params`."""
    text = heading(column).partition(" (")[0]
    is_word = text[:1].isupper() and text[1:2].islower()
    return WORDS.get(column) or (text[:1].lower() + text[1:] if is_word else text)


def listed(texts: Iterable[str]) -> str:
    """Texts as a list within a sentence: "a, b and c"."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def sentence(text: str) -> str:
    """A text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def mean_of(group: Group, column: str, interval: str) -> tuple[float, float | None] | None:
    """The mean of a group in a column's unit and the half-width of its interval, if known."""
    values = [n for row in group.rows if (n := number_in(row, column)) is not None]
    if not values:
        return None
    found = spread(values, interval)
    return found.mean, found.half_width if column in VARYING else None


def draw_line_figure(rows: Sequence[Row], x: str, y: str, how: How) -> tuple[Figure, str]:
    """One column over x: a line of means for each series, a dot for each run; with its caption."""
    baselines = baselines_without(rows, x, y) if x == "layers" else []
    rows = drawable(rows, x, y)
    groups = group_seeds(rows)
    plan = arrange(groups, x, how.group)
    with drawing():
        figure, panels = make_panels(len(plan.panels), how.width, share_y=True, share_x=True)
        intervals = Intervals(how.interval, y)
        for axes, panel in zip(panels, plan.panels, strict=True):
            axes.set_title(panel.title)
            for series in panel.series:
                draw_series(axes, series, x, y, how, intervals)
            set_x_axis(axes, [n for r in rows if (n := number_in(r, x)) is not None], x)
        values = [n for r in rows if (n := number_in(r, y)) is not None]
        levels = draw_levels(panels, baselines, y)
        values += [m[0] for g in baselines if (m := mean_of(g, y, "none")) is not None]
        intervals.draw_or_hide(panels, values, tested_images(rows))
        label_panels(panels, heading(x), heading(y))
        entries = legend_entries(plan)
        if levels and not entries:
            entries = [entry(s.label or "shared", s.look) for s in plan.panels[0].series]
        add_legend(figure, [*entries, *levels], plan.legend_title)
        finish(figure)
    caption = line_caption(groups, x, [y], intervals, plan)
    if levels:
        caption += " Horizontal lines: means of baselines, which have no number of layers."
    return figure, caption


def baselines_without(rows: Sequence[Row], x: str, y: str) -> list[Group]:
    """The baselines that have no value of x, which horizontal lines show."""
    found = [r for r in rows if number_in(r, x) is None and number_in(r, y) is not None]
    return group_seeds([row for row in found if role_of(row) == BASELINE])[:MOST_LEVELS]


def draw_levels(panels: Sequence[Axes], baselines: Sequence[Group], y: str) -> list[Line2D]:
    """Draws a horizontal line for each baseline; returns the lines of the first panel."""
    names = short_labels([str(group.first.get("name") or BASELINE) for group in baselines])
    for axes in panels:
        for index, (group, name) in enumerate(zip(baselines, names, strict=True)):
            mean = mean_of(group, y, "none")
            assert mean is not None
            look = nominal_looks(8)[6 + index % 2]
            color, dash = look.color, DASHES[3 + index]
            axes.axhline(mean[0], color=color, linestyle=dash, label=name, zorder=1.5)
    return panels[0].get_lines()[-len(baselines) :] if baselines else []


def tested_images(rows: Sequence[Row]) -> int | None:
    """The smallest number of test images that an accuracy of the rows is of."""
    counts = [number for row in rows if (number := number_in(row, "test_images"))]
    return int(min(counts)) if counts else None


def legend_entries(plan: Arrangement) -> list[Line2D]:
    """An entry for each series of any panel; none if there is only one."""
    found: dict[str, Series] = {}
    for panel in plan.panels:
        for series in panel.series:
            known = found.setdefault(series.label, series)
            if len(series.groups) > len(known.groups):
                found[series.label] = series
    if len(found) < 2:
        return []
    order = [label for label in plan.labels if label in found]
    order += [label for label in found if label not in order]
    every = [found[label] for label in order]
    return [entry(s.label, s.look, s.is_joined and len(s.groups) > 1) for s in every]


def draw_series(
    axes: Axes,
    series: Series,
    x: str,
    y: str,
    how: How,
    intervals: Intervals,
) -> None:
    """Draws a series; adds its intervals to those of the figure, which are drawn later.

    Neighbours with intervals have a band between them, others bars.
    """
    points = []
    for group in series.groups:
        at, found = number_in(group.first, x), mean_of(group, y, how.interval)
        if at is not None and found is not None:
            points.append((at, *found))
    look = series.look
    if series.is_joined and len(points) > 1:
        axes.plot([p[0] for p in points], [p[1] for p in points], color=look.color, ls=look.dash)
    several = [g for g in series.groups if sum(number_in(r, y) is not None for r in g.rows) > 1]
    means = [(p, g) for p, g in zip(points, series.groups, strict=False) if g in several]
    if means:
        axes.scatter(
            [p[0] for p, _ in means],
            [p[1] for p, _ in means],
            s=16,
            marker=look.marker,
            color=look.color,
            linewidths=0,
            zorder=4,
        )
    intervals.runs += draw_runs(axes, series.groups, x, y, look, how.links)
    run: list[tuple[float, float, float]] = []
    for at, mean, half in [*points, (0.0, 0.0, None)]:
        if half is not None:
            run.append((at, *intervals.add(mean, half)))
            if series.is_joined:
                continue
        if len(run) > 1:
            places, lows, highs = (list(part) for part in zip(*run, strict=True))
            intervals.bands.append((axes, places, lows, highs, look.color))
        elif run:
            intervals.bars.append(Bar(axes, *run[0], look.color))
        run = []


def line_caption(
    groups: Sequence[Group],
    x: str,
    columns: Sequence[str],
    intervals: Intervals,
    plan: Arrangement,
) -> str:
    """Which columns are drawn over x, what marks mean, and how many seeds there are.

    Without an interval, runs of a point may differ in more than their seed.
    """
    parts = [f"{sentence(listed(map(words_for, columns)))} over {words_for(x)}."]
    if any(column in VARYING for column in columns):
        text = intervals.text(groups, columns)
        several = not text.startswith("One run")
        parts.append("Lines join means, dots are runs." if several else "")
        parts.append("" if several and intervals.kind == "none" else text)
    if "macs" in (x, *columns):
        parts.append(FLOPS_NOTE)
    parts.append(plan.note)
    return " ".join(part for part in parts if part)
