"""Axes of figures: which numbers can be drawn, scales, ranges, and ticks that do not collide."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from sret_cli.report.columns import ACCURACIES, COLUMNS
from sret_cli.report.plot_style import FONT_SIZE, shorten
from sret_cli.spec.run import Row
from sret_cli.study.axes import number_of

LARGEST = 1e100  # beyond this, axes overflow
LOG_RATIO = 8  # largest over smallest value from which a logarithmic axis shows more
PROPORTIONAL_RATIO = 3  # the same for costs, next to another logarithmic axis
COST_RATIO = 30  # the same for costs, next to a linear axis
COUNTS = ("layers", "recursions", "epochs_trained", "measured_batch_size", "world_size")
FROM_ZERO = ("params", "macs", "activation_bytes", "peak_memory_bytes", "training_memory_bytes")
MOST_VALUE_TICKS = 9  # a tick at each value up to this number of values,
LONGEST_VALUE_TICK = 6  # and up to this number of characters
IS_ACCURACY = {*ACCURACIES, "best_top1_percent", "mean_class_top1_percent"}
SMALL_FLOPS = 0.1  # G, below which an axis shows M
TICK_GAP = 3  # pixels at 100 dpi between the texts of two ticks


def number_in(row: Row, column: str) -> float | None:
    """The finite number that a row has in a column, in the column's unit.

    Equal numbers for all stages are one number.
    """
    number = finite_number(number_of(row, column))
    divisor = COLUMNS[column].divisor if column in COLUMNS else 1
    return None if number is None else number / divisor


def finite_number(value: Any) -> float | None:
    """A value as a number that an axis can hold, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -LARGEST < value < LARGEST:  # nor if it is not a number
        return None
    return float(value) if abs(value) > 1 / LARGEST else 0.0


def number_text(value: float) -> str:
    """A number as a tick or label shows it: 1,000 and 0.05 and 3e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3g}".partition("e")[::2]
        if not exponent:  # 0.000345 has no exponent in this format
            mantissa, exponent = f"{value:.2e}".split("e")
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    if float(value).is_integer():
        return f"{int(value):,}"
    text = f"{value:,.6f}".rstrip("0") if abs(value) < 1 else f"{value:,.4f}".rstrip("0")
    return text.rstrip(".")


def has_wide_range(values: Sequence[float], ratio: float = LOG_RATIO) -> bool:
    """Whether a logarithmic axis shows the values better."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= ratio


def set_x_axis(
    axes: Axes, values: Sequence[float], column: str = "layers", *, may_be_log: bool = True
) -> None:
    """Scales the x axis to values; fields and counts that have few values have ticks at them."""
    places = sorted(set(values))
    if not places:
        return
    if may_be_log and has_wide_range(places):
        axes.set_xscale("log")
        pad = (places[-1] / places[0]) ** 0.06
        axes.set_xlim(places[0] / pad, places[-1] * pad)
    else:
        pad = 0.06 * (places[-1] - places[0]) or max(abs(places[0]) * 0.5, 0.5)
        axes.set_xlim(places[0] - pad, places[-1] + pad)
    _use_small_unit(axes.xaxis, column, places)
    are_short = all(len(number_text(place)) <= LONGEST_VALUE_TICK for place in places)
    is_chosen = column not in COLUMNS or column in COUNTS
    if len(places) <= MOST_VALUE_TICKS and are_short and is_chosen:
        axes.xaxis.set_major_locator(FixedLocator(places))
    else:
        _set_round_ticks(axes.xaxis, are_whole=all(float(place).is_integer() for place in places))
    axes.xaxis.set_minor_locator(NullLocator())


def set_y_axis(
    axes: Axes,
    column: str,
    values: Sequence[float],
    ends: Sequence[float] = (),
    test_images: int | None = None,
    *,
    is_difference: bool = False,
) -> bool:
    """Scales the y axis; returns whether it cuts off ends of intervals.

    The range of an accuracy is at least two points, or ten test images, so that one image is never
    a mountain. Intervals may widen the range to at most three times that of the values.

    Args:
        axes: the panel.
        column: what is along the axis.
        values: the values that are drawn, in the column's unit.
        ends: the ends of intervals.
        test_images: how many images an accuracy is of.
        is_difference: whether values are differences of the column, which may be negative.
    """
    if not values:
        return False
    _use_small_unit(axes.yaxis, column, values)
    low, high = min(values), max(values)
    if column in IS_ACCURACY:
        least = max(2.0, min(1000 / test_images, 20.0) if test_images else 2.0)
    elif column in FROM_ZERO:
        least = abs(high) * 0.05
    else:
        least = max(abs(high), abs(low)) * 0.02
    least = least or 1.0
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    finite = [end for end in ends if math.isfinite(end)]
    span = high - low
    floor, ceiling = low - span, high + span
    ends_low, ends_high = min([*finite, low]), max([*finite, high])
    cuts = ends_low < floor or ends_high > ceiling
    low, high = max(ends_low, floor), min(ends_high, ceiling)
    is_percent = column in IS_ACCURACY and not is_difference
    is_cost = column in FROM_ZERO or column.endswith("_seconds")
    ratio = LOG_RATIO
    if is_cost:  # of proportions, lines are straight if both axes are linear or both logarithmic
        ratio = PROPORTIONAL_RATIO if axes.get_xscale() == "log" else COST_RATIO
    if not is_percent and has_wide_range([*values, *finite], ratio):
        axes.set_yscale("log")
        pad = (max(values) / min(values)) ** 0.06
        axes.set_ylim(min([*values, *finite]) / pad, max([*values, *finite]) * pad)
        _set_round_ticks(axes.yaxis)
        return False
    pad = 0.06 * (high - low)
    low, high = low - pad, high + pad
    if is_percent:
        low = max(low, min(0.0, ends_low) - pad / 2)  # intervals may end beyond 0 and 100
        high = min(high, max(100.0, ends_high) + pad / 2)
    elif column in FROM_ZERO and min(values) >= 0:
        low = 0.0
    axes.set_ylim(low, high)
    _set_round_ticks(axes.yaxis)
    return cuts


def _use_small_unit(axis: Axis, column: str, values: Sequence[float]) -> None:
    """Shows FLOPs that are all small in M, at the same places; `break_labels` names the unit."""
    if column == "macs" and 0 < max(values) < SMALL_FLOPS:
        axis.set_major_formatter(FuncFormatter(_mega_text))


def _mega_text(value: float, position: Any = None) -> str:
    return _tick_text(1000 * value)


def _name_small_units(figure: Figure) -> None:
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if not isinstance(formatter, FuncFormatter) or formatter.func is not _mega_text:
                continue
            axis.set_label_text(axis.get_label_text().replace("FLOPs (G)", "FLOPs (M)"))
            if axis is axes.xaxis and figure.get_supxlabel() == "FLOPs (G)":
                figure.supxlabel("FLOPs (M)", fontsize=FONT_SIZE)


def _set_round_ticks(axis: Axis, are_whole: bool = False) -> None:
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log":
        axis.set_major_locator(FixedLocator(round_places(low, high)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(
            MaxNLocator(
                nbins=5,
                steps=[1, 2, 2.5, 5, 10],
                integer=are_whole,
                min_n_ticks=2 if are_whole else 3,
            )
        )


def round_places(low: float, high: float) -> list[float]:
    """Round places of a logarithmic axis: powers of ten, with 2 and 5 if these are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(np.arange(1, 10, 0.5))):
        places = [float(f"{p}e{d}") for d in decades for p in parts]
        places = [place for place in places if low <= place <= high]
        if len(places) >= 3:
            break
    step = -(-len(places) // 7) if len(places) > 7 else 1
    return places[::step]


def renderer_of(figure: Figure) -> RendererBase:
    """What measures the texts of a figure, at the figure's own resolution."""
    canvas = figure.canvas
    agg = canvas if isinstance(canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    return agg.get_renderer()


def break_labels(figure: Figure) -> None:
    """Breaks labels of y axes and titles of panels in two if they are longer than the panel."""
    _write_plain_ticks(figure)
    _name_small_units(figure)
    figure.draw_without_rendering()
    renderer = renderer_of(figure)
    for axes in figure.axes:
        room = axes.get_window_extent(renderer)
        if axes.yaxis.label.get_window_extent(renderer).height > room.height:
            axes.yaxis.label.set_text(in_two_lines(axes.yaxis.label.get_text(), " ("))
        title = axes.title if not axes.get_title(loc="left") else axes._left_title  # type: ignore[attr-defined]
        width = title.get_window_extent(renderer).width
        if width > room.width:
            most = int(len(title.get_text()) * room.width / width)
            lines = in_two_lines(title.get_text(), ", ").split("\n")
            title.set_text("\n".join(shorten(line, max(most, 8)) for line in lines))


def in_two_lines(text: str, mark: str) -> str:
    """A text with a line break at a mark, or else at the space nearest to its middle."""
    ends = [i for i in range(1, len(text)) if text.startswith(mark, i)]
    ends = ends or [i for i in range(1, len(text)) if text[i] == " "]
    if not ends:
        return text
    end = min(ends, key=lambda i: abs(i - len(text) / 2))
    end += text[end] == ","
    return f"{text[:end]}\n{text[end:].strip()}"


def _write_plain_ticks(figure: Figure) -> None:
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), FuncFormatter | NullFormatter):
                continue
            if axis.get_label_text() or _has_numbers(axis):
                axis.set_major_formatter(FuncFormatter(_tick_text))


def fix_ticks(figure: Figure) -> None:
    """Writes all ticks as plain numbers, and takes away those whose texts would collide."""
    _write_plain_ticks(figure)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
            has_texts = axis.get_tick_params()["labelbottom" if side == 0 else "labelleft"]
            if has_texts and isinstance(axis.get_major_formatter(), FuncFormatter):
                _thin(figure, axis, side)


def _has_numbers(axis: Axis) -> bool:
    return not isinstance(axis.get_major_locator(), NullLocator)


def _tick_text(value: float, position: Any = None) -> str:
    text = number_text(float(f"{value:.10g}"))
    return f"−{text[1:]}" if text.startswith("-") else text


def _thin(figure: Figure, axis: Axis, side: int) -> None:
    """Keeps the ticks that have room: each second or third of even ticks, else those that fit."""
    low, high = sorted(axis.get_view_interval())
    places = [p for p in axis.get_majorticklocs() if low <= p <= high]
    boxes = []
    renderer = renderer_of(figure)
    for tick, place in zip(axis.get_major_ticks(len(places)), places, strict=True):
        tick.label1.set_text(axis.get_major_formatter()(place))
        tick.update_position(place)
        box = tick.label1.get_window_extent(renderer)
        boxes.append((box.x0, box.x1) if side == 0 else (box.y0, box.y1))
    if isinstance(axis.get_major_locator(), FixedLocator):
        kept = fitting(boxes, TICK_GAP)
    else:
        kept = list(range(len(places)))
        step = 1
        while not all(boxes[a][1] + TICK_GAP <= boxes[b][0] for a, b in pairwise(kept)):
            step += 1
            kept = list(range(0, len(places), step))
    axis.set_major_locator(FixedLocator([places[i] for i in kept]))


def fitting(spans: Sequence[tuple[float, float]], gap: float) -> list[int]:
    """Which of the spans can stand next to each other: the first, the last, and what fits between.

    The spans are in the order of their places.
    """
    if not spans:
        return []
    kept = [0]
    last = len(spans) - 1
    for index in range(1, last):
        fits = spans[kept[-1]][1] + gap <= spans[index][0]
        if fits and spans[index][1] + gap <= spans[last][0]:
            kept.append(index)
    if last and spans[kept[-1]][1] + gap <= spans[last][0]:
        kept.append(last)
    return kept
