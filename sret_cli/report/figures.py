"""Figures of rows, as PNG and SVG. Equal rows give equal bytes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sret_cli.report.columns import COLUMNS, FLOPS_NOTE, heading, mean_and_deviation
from sret_cli.runtime.files import write_atomically
from sret_cli.spec.run import Row
from sret_cli.study.axes import format_value, varying_fields

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


def plot_rows(rows: Sequence[Row], x: str, columns: Sequence[str]) -> Figure:
    """A figure with one panel for each column over x: a marker for each run, a line of means.

    With several seeds, a band shows one standard deviation to each side. Runs that differ in a
    field other than x are separate series.
    """
    follows = {"layers": ["model.recursions"]}.get(x, [x])
    fields = [f for f in varying_fields(rows) if f not in follows]
    with series_style():
        figure = Figure(figsize=(max(4.2 * len(columns), 5.5), 3.6), layout="constrained")
        panels = figure.subplots(1, len(columns), squeeze=False)[0]
        for axes, column in zip(panels, columns, strict=True):
            _draw(axes, rows, x, column, fields)
        if fields:
            panels[-1].legend(title=", ".join(heading(f) for f in fields), fontsize=8)
        if "macs" in columns or x == "macs":
            figure.supxlabel(FLOPS_NOTE, fontsize=7, x=0.01, ha="left", color="0.4")
        return figure


def _draw(axes: Axes, rows: Sequence[Row], x: str, column: str, fields: Sequence[str]) -> None:
    plotted = [row for row in rows if can_plot(row, x, column)]
    unit_x = COLUMNS[x].divisor if x in COLUMNS else 1
    unit_y = COLUMNS[column].divisor if column in COLUMNS else 1
    series: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for row in plotted:
        points = series.setdefault(tuple(format_value(row.get(f)) for f in fields), {})
        points.setdefault(row[x] / unit_x, []).append(row[column] / unit_y)
    for index, (label, points) in enumerate(series.items()):
        color, marker = COLORS[index % len(COLORS)], MARKERS[(index + index // 7) % len(MARKERS)]
        at = sorted(points)
        means, deviations = zip(*(mean_and_deviation(points[p]) for p in at), strict=True)
        axes.plot(at, means, color=color)
        axes.plot([], [], color=color, marker=marker, markersize=4, label=", ".join(label))
        if any(deviations):
            low = [m - d for m, d in zip(means, deviations, strict=True)]
            high = [m + d for m, d in zip(means, deviations, strict=True)]
            axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
        for place in at:
            values = points[place]
            axes.scatter([place] * len(values), values, color=color, marker=marker, s=18, zorder=3)
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
    if _wide(ys, 3 if axes.get_xscale() == "log" else 8):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif column in ("params", "macs", "activation_bytes", "peak_memory_bytes"):
        axes.set_ylim(0, max(ys) * 1.15)


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
