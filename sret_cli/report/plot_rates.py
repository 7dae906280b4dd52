"""Accuracy over the learning rate, one curve for each depth, and the best rate over depth."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from sret_cli.report.columns import heading
from sret_cli.report.groups import group_seeds
from sret_cli.report.plot_axes import (
    IS_ACCURACY,
    MOST_VALUE_TICKS,
    number_in,
    number_text,
    set_x_axis,
    set_y_axis,
)
from sret_cli.report.plot_intervals import Intervals
from sret_cli.report.plot_lines import (
    draw_series,
    drawable,
    legend_entries,
    listed,
    mean_of,
    tested_images,
    words_for,
)
from sret_cli.report.plot_panels import (
    How,
    add_legend,
    drawing,
    finish,
    make_panels,
)
from sret_cli.report.plot_series import Arrangement, Series, arrange
from sret_cli.report.plot_style import COLORS, DASHES, MARKERS
from sret_cli.spec.run import Row


def best_point(series: Series, x: str, y: str, interval: str) -> tuple[float, float] | None:
    """Where the mean of a series is best: highest for an accuracy, lowest for a loss."""
    points = [
        (place, found[0])
        for group in series.groups
        if (place := number_in(group.first, x)) is not None
        and (found := mean_of(group, y, interval)) is not None
    ]
    if len(points) < 2:
        return None
    choose = max if y in IS_ACCURACY else min
    return choose(points, key=lambda point: point[1])


def draw_rates(rows: Sequence[Row], x: str, y: str, how: How) -> tuple[Figure, str]:
    """Panels of a column over the learning rate, and one of the best rate over depth."""
    rows = drawable(rows, x, y)
    groups = group_seeds(rows)
    plan = arrange(groups, x, how.group or ("layers",))
    intervals = Intervals(how.interval, y)
    best: dict[str, list[tuple[float, float]]] = {}
    edges: list[str] = []
    xs = sorted({n for row in rows if (n := number_in(row, x)) is not None})
    with drawing():
        over_depth = how.group is None and len({number_in(row, "layers") for row in rows}) > 1
        figure, panels = make_panels(len(plan.panels) + over_depth, how.width)
        curves = panels[: len(plan.panels)]
        for axes, panel in zip(curves, plan.panels, strict=True):
            axes.set_title(panel.title)
            places = best.setdefault(panel.setting, [])
            for series in panel.series:
                draw_series(axes, series, x, y, how, intervals)
                if (found := best_point(series, x, y, how.interval)) is None:
                    continue
                axes.scatter(
                    [found[0]],
                    [found[1]],
                    s=52,
                    facecolors="none",
                    edgecolors=series.look.color,
                    linewidths=1.0,
                    zorder=5,
                )
                depth = number_in(series.groups[0].first, "layers")
                if depth is not None:
                    places.append((depth, found[0]))
                if found[0] in (xs[0], xs[-1]) and series.label not in edges:
                    edges.append(series.label)
            set_x_axis(axes, xs, x)
            axes.set(xlabel=heading(x))
        for axes in curves[1:]:
            axes.sharey(curves[0])
        values = [n for row in rows if (n := number_in(row, y)) is not None]
        intervals.draw_or_hide(curves, values, tested_images(rows))
        for axes in curves:
            axes.set_ylabel(heading(y))
        entries = legend_entries(plan)
        if over_depth:
            _draw_best(panels[-1], best, x, xs)
            if len(best) > 1:
                entries += panels[-1].get_lines()
        add_legend(figure, entries, plan.legend_title)
        finish(figure)
    return figure, _caption(plan, x, y, intervals, best, edges)


def _draw_best(
    axes: Axes,
    best: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    rates: Sequence[float],
) -> None:
    """Draws the best rate over depth, on the scale of all rates that were tried."""
    depths: list[float] = []
    for index, (title, places) in enumerate(best.items()):
        axes.plot(
            [depth for depth, _ in sorted(places)],
            [rate for _, rate in sorted(places)],
            color=COLORS[(6 + index) % 8],
            marker=MARKERS[index % 8],
            linestyle=DASHES[index % 8],
            label=f"best, {title}",
        )
        depths += [depth for depth, _ in places]
    set_x_axis(axes, depths)
    set_y_axis(axes, x, rates)
    if len(rates) <= MOST_VALUE_TICKS:
        axes.yaxis.set_major_locator(FixedLocator(rates))
    axes.set(xlabel=heading("layers"), ylabel=f"Best {words_for(x)}")


def _caption(
    plan: Arrangement,
    x: str,
    y: str,
    intervals: Intervals,
    best: Mapping[str, Sequence[tuple[float, float]]],
    edges: Sequence[str],
) -> str:
    parts = [
        f"{words_for(y)[:1].upper()}{words_for(y)[1:]} over {words_for(x)}; a ring marks the best "
        "mean of each curve."
    ]
    every = list(best.values())
    if len(every) == 1 and every[0]:
        found = [f"{number_text(rate)} at {depth:,g}" for depth, rate in sorted(every[0])]
        parts.append(f"Best at depth: {', '.join(found)} layers.")
    groups = [g for panel in plan.panels for series in panel.series for g in series.groups]
    parts.append(intervals.text(groups))
    if edges:
        title = f"{plan.legend_title} " if plan.legend_title else ""
        parts.append(f"At the edge of what was tried is the best of {title}{listed(edges)}.")
    return " ".join(part for part in parts if part)
