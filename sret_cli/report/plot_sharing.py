"""Shared models against their twins: accuracies, and under them the differences paired by seed."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sret_cli.report.columns import heading
from sret_cli.report.comparisons import Comparison, compare
from sret_cli.report.groups import Group, group_seeds, role_of
from sret_cli.report.intervals import BANDS, Spread
from sret_cli.report.plot_axes import finite_number, number_in, set_x_axis, set_y_axis
from sret_cli.report.plot_intervals import Bar, Intervals
from sret_cli.report.plot_lines import (
    draw_series,
    legend_entries,
    tested_images,
    words_for,
)
from sret_cli.report.plot_panels import How, add_legend, drawing, finish, make_panels
from sret_cli.report.plot_series import Panel, arrange
from sret_cli.report.plot_style import GREY, ROLE_LOOKS, Look, nominal_looks
from sret_cli.spec.run import Row

DODGE = 0.018  # of the width of a panel, between controls of one depth


def sharing_pairs(rows: Sequence[Row], y: str, interval: str) -> list[Comparison]:
    """The comparisons of shared models that have a depth and a finite difference."""
    done = [row for row in rows if _has_all(row)]
    return [c for c in compare(done, interval) if c.shared.first.get("layers") is not None]


def _has_all(row: Row) -> bool:
    results = (row.get(column) for column in ("layers", "top1_percent", "test_loss"))
    costs = (row.get(column) for column in ("params", "macs"))
    return all(finite_number(value) is not None for value in results) and all(
        value is None or finite_number(value) is not None for value in costs
    )


def draw_sharing(rows: Sequence[Row], y: str, how: How) -> tuple[Figure, str]:
    """Two panels for each setting: a column over depth by role, and shared minus control."""
    pairs = sharing_pairs(rows, y, how.interval)
    involved = {id(row) for c in pairs for g in (c.shared, c.control) for row in g.rows}
    groups = group_seeds([row for row in rows if id(row) in involved])
    plan = arrange(groups, "layers", ("role",), may_be_loose=False)
    most = 2 if how.width == "column" else 3
    with_pairs = [panel for panel in plan.panels if _pairs_in(panel, pairs)]
    left_out = len(with_pairs) - most
    plan = replace(plan, panels=tuple(with_pairs[:most]))
    count = len(plan.panels)
    with drawing():
        columns = 2 if count == 1 else count
        figure, panels = make_panels(2 * count, how.width, columns=columns, aspect=0.62)
        tops, lows = panels[:count], panels[count:]
        intervals = Intervals(how.interval, y)
        differences = Intervals(how.interval, y)
        shown: list[Spread] = []
        for top, low, panel in zip(tops, lows, plan.panels, strict=True):
            for series in panel.series:
                draw_series(top, series, "layers", y, how, intervals)
            shown += _draw_differences(low, panel, pairs, y, differences)
            own = [c.shared for c in pairs] if count == 1 else groups
            for axes, members in ((top, groups), (low, own)):
                set_x_axis(axes, [n for g in members if (n := _depth(g)) is not None])
                axes.set_xlabel(heading("layers"))
            top.set_title(panel.title)
            if count == 1:
                continue
            top.tick_params(labelbottom=False)
            top.set_xlabel("")
        _share(tops)
        _share(lows)
        values = [n for g in groups for row in g.rows if (n := number_in(row, y)) is not None]
        intervals.draw_or_hide(tops, values, tested_images(rows))
        _scale_differences(lows[0], y, shown)
        differences.draw_bars()
        tops[0].set_ylabel(heading(y))
        lows[0].set_ylabel(_difference_label(y))
        add_legend(figure, legend_entries(plan))
        finish(figure)
    return figure, _caption(y, groups, shown, left_out, intervals, differences)


def _draw_differences(
    axes: Axes,
    panel: Panel,
    pairs: Sequence[Comparison],
    y: str,
    differences: Intervals,
) -> list[Spread]:
    """Draws the differences of the shared models of a panel; returns them."""
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    found = _pairs_in(panel, pairs)
    roles = list(dict.fromkeys(role_of(c.control.first) for c in found))
    depths = [_depth(c.shared) or 0.0 for c in found]
    span = max(depths, default=0) - min(depths, default=0)
    for index, role in enumerate(roles):
        look: Look = ROLE_LOOKS.get(role) or nominal_looks(8)[index]
        for c in (c for c in found if role_of(c.control.first) == role):
            spread = c.top1 if y == "top1_percent" else c.loss
            shift = (index - (len(roles) - 1) / 2) * DODGE * span
            at = (_depth(c.shared) or 0.0) + shift
            axes.plot([at], [spread.mean], color=look.color, marker=look.marker, linestyle="none")
            if spread.half_width is not None:
                low, high = differences.add(spread.mean, spread.half_width)
                differences.bars.append(Bar(axes, at, low, high, look.color))
    return [c.top1 if y == "top1_percent" else c.loss for c in found]


def _scale_differences(axes: Axes, y: str, shown: Sequence[Spread]) -> None:
    """Scales the axis of differences to three times the largest, or to the smallest interval."""
    ends = [(s.mean - s.half_width, s.mean + s.half_width) for s in shown if s.half_width]
    smallest = min((max(abs(low), abs(high)) for low, high in ends), default=0.0)
    reach = max(3 * max((abs(s.mean) for s in shown), default=0.0), smallest)
    held = [max(min(end, reach), -reach) for both in ends for end in both]
    column = y if y == "top1_percent" else "difference"
    set_y_axis(axes, column, [0.0, *(s.mean for s in shown), *held], is_difference=True)


def _pairs_in(panel: Panel, pairs: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons whose shared model a panel shows."""
    mine = {id(row) for group in _groups(panel) for row in group.rows}
    return [c for c in pairs if id(c.shared.first) in mine]


def _share(panels: Sequence[Axes]) -> None:
    for axes in panels[1:]:
        axes.sharey(panels[0])
        axes.tick_params(labelleft=False)


def _groups(panel: Panel) -> list[Group]:
    return [group for series in panel.series for group in series.groups]


def _depth(group: Group) -> float | None:
    return number_in(group.first, "layers")


def _difference_label(y: str) -> str:
    return "Shared − control (points)" if y == "top1_percent" else "Shared − control (loss)"


def _caption(
    y: str,
    groups: Sequence[Group],
    shown: Sequence[Spread],
    left_out: int,
    intervals: Intervals,
    differences: Intervals,
) -> str:
    counts = sorted({spread.n for spread in shown})
    seeds = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    where = "above" if y == "top1_percent" else "below"
    parts = [
        f"Shared models and their controls: {words_for(y)} over layers, and the difference "
        f"between runs with the same seed ({where} 0 the shared model is better)."
    ]
    if counts[-1] > 1:
        parts.append(f"{seeds} pairs of seeds at each point.")
    if intervals.is_hidden or counts[-1] == 1:
        parts.append(intervals.text(groups))
    if differences.bars:
        name = "Bars" if intervals.is_hidden or not intervals.bands else "Bands and bars"
        parts.append(f"{name}: {BANDS[differences.kind]}.")
    if differences.is_cut:
        parts.append("An arrow head marks a bar that is longer than the axis.")
    if left_out > 0:
        parts.append(f"{left_out} more settings are left out; choose with `where`.")
    return " ".join(parts)
