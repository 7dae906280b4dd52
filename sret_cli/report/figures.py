"""Figures of rows, as PNG and SVG. Equal rows give equal bytes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sret_cli.report.columns import ACCURACIES, COLUMNS, FLOPS_NOTE, VARYING, heading
from sret_cli.report.groups import Group, group_seeds, series_fields, series_key
from sret_cli.report.intervals import BANDS, spread
from sret_cli.report.summary import field_text
from sret_cli.runtime.files import write_atomically
from sret_cli.spec.run import Row

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe, Ito
MARKERS = "osD^vPX"


def can_plot(row: Row, x: str, y: str) -> bool:
    """Whether a row has a number for each axis."""
    return all(isinstance(row.get(c), int | float) for c in (x, y))


def series_style() -> Any:
    """A context with Matplotlib's settings for every figure."""
    return matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.hashsalt": "sret",
            "savefig.dpi": 160,
        }
    )


def plot_rows(
    rows: Sequence[Row], x: str, columns: Sequence[str], interval: str = "ci95"
) -> Figure:
    """A figure with one panel for each column over x: a marker for each run, a line of means.

    With several seeds, a band shows the interval of the mean. Each line joins settings that differ
    in x alone, or in what changes with it, such as the recursions along the layers.
    """
    groups = [g for g in group_seeds(rows) if any(can_plot(g.first, x, c) for c in columns)]
    groups = groups or group_seeds(rows)
    fields = series_fields(groups, x)
    with series_style():
        figure = Figure(figsize=(max(4.2 * len(columns), 5.5), 3.6), layout="constrained")
        panels = figure.subplots(1, len(columns), squeeze=False)[0]
        has_band = False
        for axes, column in zip(panels, columns, strict=True):
            has_band |= _draw(axes, groups, x, column, fields, interval)
        if fields:
            handles, labels = panels[-1].get_legend_handles_labels()
            figure.legend(
                handles,
                labels,
                title=", ".join(heading(f) for f in fields),
                loc="outside right upper",
                fontsize=8,
                title_fontsize=8,
            )
        notes = [FLOPS_NOTE] * ("macs" in (x, *columns))
        notes += [f"Band: {BANDS[interval]}."] * has_band
        if notes:
            figure.supxlabel(" ".join(notes), fontsize=7, x=0.01, ha="left", color="0.4")
        return figure


def _draw(
    axes: Axes,
    groups: Sequence[Group],
    x: str,
    column: str,
    fields: Sequence[str],
    interval: str,
) -> bool:
    """Draws a panel; returns whether it has a band."""
    unit_x = COLUMNS[x].divisor if x in COLUMNS else 1
    unit_y = COLUMNS[column].divisor if column in COLUMNS else 1
    series: dict[str, list[Group]] = {}
    for group in groups:
        if any(can_plot(row, x, column) for row in group.rows):
            series.setdefault(series_key(group.first, fields), []).append(group)
    has_band = False
    for index, members in enumerate(series.values()):
        members.sort(key=lambda group: _number(group.first[x]))
        color, marker = COLORS[index % len(COLORS)], MARKERS[(index + index // 7) % len(MARKERS)]
        at = [group.first[x] / unit_x for group in members]
        found = [spread([v / unit_y for v in group.values(column)], interval) for group in members]
        axes.plot(at, [s.mean for s in found], color=color)
        label = ", ".join(field_text(members[0].first, field) for field in fields)
        axes.plot([], [], color=color, marker=marker, markersize=4, label=label)
        if column in VARYING and any(s.half_width is not None for s in found):
            has_band = True
            low = [s.mean - (s.half_width or 0) for s in found]
            high = [s.mean + (s.half_width or 0) for s in found]
            axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
        for place, group in zip(at, members, strict=True):
            values = [v / unit_y for v in group.values(column)]
            axes.scatter([place] * len(values), values, color=color, marker=marker, s=18, zorder=3)
    plotted = [row for group in groups for row in group.rows if can_plot(row, x, column)]
    axes.set(xlabel=heading(x), ylabel=heading(column))
    xs = sorted({row[x] / unit_x for row in plotted})
    ys = [row[column] / unit_y for row in plotted]
    if _wide(xs):
        axes.set_xscale("log")
        if len(xs) <= 8:
            axes.set_xticks(xs, [f"{v:,g}" for v in xs])
            axes.minorticks_off()
    elif x == "layers" and len(xs) <= 8:
        axes.set_xticks(xs)
    if column not in ACCURACIES and _wide(ys, 3 if axes.get_xscale() == "log" else 8):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif column in ("params", "macs", "activation_bytes", "peak_memory_bytes"):
        axes.set_ylim(0, max(ys) * 1.15)
    if column in ACCURACIES:
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 0.0), min(top, 100.0))
    return has_band


def _number(value: Any) -> float:
    return float(value)


def _wide(values: Sequence[float], ratio: float = 8) -> bool:
    """Whether a logarithmic axis shows the values better.

    Next to another logarithmic axis a smaller ratio is enough: proportions are then straight lines.
    """
    return min(values) > 0 and max(values) / min(values) >= ratio


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PNG and SVG, reproducible to the byte; returns the files."""
    files = []
    for suffix in ("png", "svg"):
        data = io.BytesIO()
        with series_style():
            figure.savefig(
                data, format=suffix, metadata={"Date": None} if suffix == "svg" else None
            )
        files.append(stem.with_name(f"{stem.name}.{suffix}"))
        write_atomically(files[-1], data.getvalue())
    return files
