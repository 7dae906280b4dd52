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
from sret_cli.report.plot_lines import (
    draw_series,
    fade_bands,
    legend_entries,
    tested_images,
    words_for,
)
from sret_cli.report.plot_panels import How, add_legend, drawing, finish, make_panels, seeds_text
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
        marks: set[str] = set()
        ends: list[float] = []
        shown: list[Spread] = []
        for top, low, panel in zip(tops, lows, plan.panels, strict=True):
            for series in panel.series:
                marks |= draw_series(top, series, "layers", y, how, ends)
            shown += _draw_differences(low, panel, pairs, y)
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
        cuts = set_y_axis(tops[0], y, values, ends, tested_images(rows))
        if cuts:
            fade_bands(tops)
        halves = [s.half_width or 0.0 for s in shown]
        cuts |= set_y_axis(
            lows[0],
            y if y == "top1_percent" else "difference",
            [0.0, *(s.mean for s in shown)],
            [end for s, h in zip(shown, halves, strict=True) for end in (s.mean - h, s.mean + h)],
            is_difference=True,
        )
        tops[0].set_ylabel(heading(y))
        lows[0].set_ylabel(_difference_label(y))
        add_legend(figure, legend_entries(plan))
        finish(figure)
    return figure, _caption(y, how.interval, groups, shown, left_out, cuts)


def _draw_differences(
    axes: Axes, panel: Panel, pairs: Sequence[Comparison], y: str
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
            axes.errorbar(
                [(_depth(c.shared) or 0.0) + shift],
                [spread.mean],
                yerr=None if spread.half_width is None else [spread.half_width],
                color=look.color,
                marker=look.marker,
                markersize=4,
                elinewidth=1.0,
                capsize=2,
                linestyle="none",
            )
    return [c.top1 if y == "top1_percent" else c.loss for c in found]


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
    interval: str,
    groups: Sequence[Group],
    shown: Sequence[Spread],
    left_out: int,
    cuts: bool,
) -> str:
    counts = sorted({spread.n for spread in shown})
    seeds = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    several = counts[-1] > 1 and interval != "none"
    where = "above" if y == "top1_percent" else "below"
    parts = [
        f"Shared models and their controls: {words_for(y)} over layers, and the difference "
        f"between runs with the same seed ({where} 0 the shared model is better).",
        seeds_text(groups, [y]) if counts[-1] == 1 else f"{seeds} pairs of seeds at each point.",
        f"Bands and bars: {BANDS[interval]}." if several else "",
        "Intervals wider than the axis are cut off." if cuts else "",
        f"{left_out} more settings are left out; choose with `where`." if left_out > 0 else "",
    ]
    return " ".join(part for part in parts if part)
