"""Learning curves: of one run, and of a study with bands over seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sret_cli.report.columns import heading
from sret_cli.report.groups import Group, group_seeds
from sret_cli.report.intervals import spread
from sret_cli.report.metrics import read_metrics
from sret_cli.report.plot_axes import finite_number, set_x_axis, set_y_axis
from sret_cli.report.plot_files import save_figure
from sret_cli.report.plot_intervals import Intervals
from sret_cli.report.plot_lines import sentence, tested_images, words_for
from sret_cli.report.plot_panels import (
    How,
    add_legend,
    drawing,
    finish,
    label_panels,
    make_panels,
)
from sret_cli.report.plot_series import Series, arrange
from sret_cli.report.plot_style import COLORS
from sret_cli.runtime.files import make_directory
from sret_cli.spec.run import Row

Lines = Mapping[str, Sequence[dict[str, Any]]]  # the lines of `metrics.jsonl` by run id
# The columns of rows that lines of epochs have as well, by their keys there.
CURVES = {
    "top1_percent": "top1_percent",
    "top5_percent": "top5_percent",
    "test_loss": "test_loss",
    "final_loss": "train_loss",
    "ema_top1_percent": "ema_top1_percent",
    "ema_test_loss": "ema_test_loss",
}


def curve_of(row: Row, metrics: Lines, y: str) -> dict[int, float]:
    """The values of a run's curve by epoch; empty without metrics."""
    found: dict[int, float] = {}
    for line in metrics.get(str(row.get("run_id")), ()):
        value, epoch = finite_number(line.get(CURVES[y])), line.get("epoch")
        if "step" not in line and isinstance(epoch, int) and value is not None:
            found[epoch] = value
    return found


def rows_with_curves(rows: Sequence[Row], metrics: Lines, y: str) -> list[Row]:
    """The rows whose runs have at least two epochs."""
    return [row for row in rows if len(curve_of(row, metrics, y)) > 1]


def draw_curves(rows: Sequence[Row], metrics: Lines, y: str, how: How) -> tuple[Figure, str]:
    """A column over the epochs: a line of means for each depth or series, with bands over seeds."""
    rows = rows_with_curves(rows, metrics, y)
    groups = group_seeds(rows)
    depths = {json.dumps(row.get("layers")) for row in rows}
    chosen = how.group or (("layers",) if len(depths) > 1 else None)
    plan = arrange(groups, "epoch", chosen, may_be_loose=False)
    curves = {id(group): _values(group, metrics, y) for group in groups}
    intervals = Intervals(how.interval, y)
    with drawing():
        figure, panels = make_panels(len(plan.panels), how.width, share_x=True, share_y=True)
        epochs = sorted({epoch for curve in curves.values() for epoch in curve})
        for axes, panel in zip(panels, plan.panels, strict=True):
            axes.set_title(panel.title)
            for series in panel.series:
                for group in series.groups:
                    _draw_curve(axes, curves[id(group)], series, intervals)
            set_x_axis(axes, epochs, may_be_log=False)
        means = [sum(v) / len(v) for curve in curves.values() for v in curve.values()]
        intervals.draw_or_hide(panels, means, tested_images(rows))
        if intervals.is_hidden:
            for axes, panel in zip(panels, plan.panels, strict=True):
                for series in panel.series:
                    for group in series.groups:
                        _draw_runs(axes, curves[id(group)], series)
            values = [v for curve in curves.values() for one in curve.values() for v in one]
            set_y_axis(panels[0], y, values, (), tested_images(rows))
        label_panels(panels, "Epoch", heading(y))
        looks = {series.label: series.look for panel in plan.panels for series in panel.series}
        entries = [
            Line2D([], [], color=looks[label].color, linestyle=looks[label].dash, label=label)
            for label in sorted(looks, key=lambda text: (*plan.labels, text).index(text))
        ]
        entries = entries if len(entries) > 1 else []
        add_legend(figure, entries, plan.legend_title)
        finish(figure)
    counts = sorted({len(group.rows) for group in groups})
    seeds = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else str(counts[0])
    parts = [
        f"{sentence(words_for(y))} after each epoch.",
        "One run in each curve." if counts == [1] else f"Means of {seeds} seeds.",
        "Thin lines are runs." if intervals.is_hidden else "",
        "" if counts == [1] else intervals.text(groups).removeprefix(f"{seeds} seeds. "),
        plan.note,
    ]
    return figure, " ".join(part for part in parts if part)


def _values(group: Group, metrics: Lines, y: str) -> dict[int, list[float]]:
    """The values of all seeds by epoch, of the epochs that each seed has."""
    curves = [curve_of(row, metrics, y) for row in group.rows]
    common = set.intersection(*(set(curve) for curve in curves))
    return {epoch: [curve[epoch] for curve in curves] for epoch in sorted(common)}


def _draw_curve(
    axes: Axes, curve: Mapping[int, Sequence[float]], series: Series, intervals: Intervals
) -> None:
    if not curve:
        return
    found = [spread(values, intervals.kind) for values in curve.values()]
    epochs, color = list(curve), series.look.color
    axes.plot(epochs, [s.mean for s in found], color=color, ls=series.look.dash)
    if all(s.half_width is not None for s in found):
        ends = [intervals.add(s.mean, s.half_width or 0) for s in found]
        lows, highs = [low for low, _ in ends], [high for _, high in ends]
        intervals.bands.append((axes, [float(epoch) for epoch in epochs], lows, highs, color))


def _draw_runs(axes: Axes, curve: Mapping[int, Sequence[float]], series: Series) -> None:
    """A thin line for each run of several."""
    runs = list(zip(*curve.values(), strict=True))
    for run in runs if len(runs) > 1 else []:
        axes.plot(list(curve), run, color=series.look.color, linewidth=0.5, alpha=0.6, zorder=1.5)


def write_training_figure(run_directory: Path, directory: Path) -> list[Path]:
    """Draws a run's losses and test accuracy from its `metrics.jsonl`; returns the files.

    Returns no files if the directory has no metrics of a finished epoch.
    """
    lines = read_metrics(run_directory, steps=True)
    if (figure := draw_training(lines)) is None:
        return []
    return save_figure(figure, make_directory(directory) / "training")


EPOCH_RESULTS = ("train_loss", "test_loss", "top1_percent")


def _has_numbers(line: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return all(finite_number(line.get(key)) is not None for key in keys)


def draw_training(lines: Sequence[dict[str, Any]]) -> Figure | None:
    """A run's losses and test accuracy; None without a finished epoch."""
    steps = [line for line in lines if _has_numbers(line, ("step", "loss"))]
    epochs = [line for line in lines if _has_numbers(line, ("epoch", *EPOCH_RESULTS))]
    if not epochs:
        return None
    blue, red = COLORS[:2]
    with drawing():
        figure, (loss, accuracy) = make_panels(2, "page")
        per_epoch = sum(line.get("epoch") == epochs[0]["epoch"] for line in steps) or 1
        at = [line["step"] / per_epoch for line in steps]
        step_loss = [line["loss"] for line in steps]
        loss.plot(at, step_loss, color=blue, alpha=0.3, linewidth=0.7, label="each training step")
        ends = [line["epoch"] for line in epochs]
        train = [line["train_loss"] for line in epochs]
        loss.plot(ends, train, color=blue, marker="o", label="training, mean of the epoch")
        test = [line["test_loss"] for line in epochs]
        loss.plot(ends, test, color=red, marker="s", ls="--", label="test")
        loss.set(xlabel="Epoch", ylabel="Loss")
        top1 = [line["top1_percent"] for line in epochs]
        accuracy.plot(ends, top1, color=red, marker="s", ls="--")
        accuracy.set(xlabel="Epoch", ylabel=heading("top1_percent"))
        set_y_axis(accuracy, "top1_percent", top1, (), epochs[-1].get("test_images"))
        accuracy.set_xlim(loss.get_xlim())
        add_legend(figure, loss.get_lines())
        return finish(figure)
