"""Panels, legends and dots that all kinds of figures have in common."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sret_cli.report.groups import Group
from sret_cli.report.plot_axes import break_labels, fix_ticks, number_in, renderer_of
from sret_cli.report.plot_style import FONT_SIZE, WIDTHS, Look, paper_style

POINTS_PER_INCH = 72


@dataclass(frozen=True)
class Drawn:
    """A figure with what stands next to it.

    Attributes:
        name: stem of its files.
        kind: one of `view.KINDS`.
        title: one line for people.
        caption: what is drawn, what bands and bars are, how many seeds there are.
        figure: the figure.
    """

    name: str
    kind: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class How:
    """How figures of a report are drawn.

    Attributes:
        group: the fields that form series; None: the roles.
        interval: one of `intervals.KINDS`.
        width: "column" or "page".
        links: whether the dot of a run is a link to `#run-<run_id>`.
        published: whether published models stand behind one's own.
    """

    group: tuple[str, ...] | None = None
    interval: str = "ci95"
    width: str = "page"
    links: bool = False
    published: bool = False


@contextmanager
def drawing() -> Iterator[None]:
    """The style of figures, without warnings of signs that the font lacks: they are boxes."""
    with paper_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        yield


def make_panels(
    count: int,
    width: str,
    *,
    columns: int | None = None,
    share_y: bool = False,
    share_x: bool = False,
    aspect: float = 0.78,
) -> tuple[Figure, list[Axes]]:
    """A figure of a width of a paper, and its panels from left to right and down.

    Args:
        count: number of panels.
        width: "column" or "page".
        columns: panels next to each other; by default as many as are wide enough.
        share_y: whether all panels have one y axis, labelled at the left.
        share_x: likewise for x, labelled at the bottom.
        aspect: height of a panel over its width.
    """
    inches = WIDTHS[width]
    if columns is None:
        columns = 2 if width == "column" or count in (2, 4) else 3
    columns = min(count, columns)
    rows = -(-count // columns)
    height = max(min(inches / columns * aspect, 2.6), 1.5)
    total = rows * height + 0.17  # for one line of legend or titles
    figure = Figure(figsize=(inches, total), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.03)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y, sharex=share_x)
    every = [axes for line in grid for axes in line]
    for index, axes in enumerate(every[:count]):
        if share_x:
            axes.tick_params(labelbottom=index + columns >= count)
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def label_panels(axes: Sequence[Axes], x: str, y: str = "") -> None:
    """Labels of shared axes: x under each panel of the last row, y, if any, at the left.

    If that row is not full, there is one label of x for the figure.
    """
    figure = axes[0].figure
    grid = axes[0].get_subplotspec()
    assert isinstance(figure, Figure) and grid is not None
    is_full = len(axes) % grid.get_gridspec().ncols == 0
    if not is_full and x:
        figure.supxlabel(x, fontsize=FONT_SIZE)
    for panel in axes:
        place = panel.get_subplotspec()
        assert place is not None
        if y and place.is_first_col():
            panel.set_ylabel(y)
        if is_full and not any(_is_below(other, panel) for other in axes):
            panel.set_xlabel(x)


def _is_below(one: Axes, other: Axes) -> bool:
    first, second = one.get_subplotspec(), other.get_subplotspec()
    assert first is not None and second is not None
    return (
        first.colspan.start == second.colspan.start and first.rowspan.start > second.rowspan.start
    )


def entry(label: str, look: Look, is_joined: bool = True) -> Line2D:
    """The entry of a series in a legend."""
    return Line2D(
        [],
        [],
        color=look.color,
        marker=look.marker,
        linestyle=look.dash if is_joined else "none",
        markersize=4,
        label=label,
    )


def note_entry(text: str) -> Line2D:
    """An entry of a legend that is only a text."""
    return Line2D([], [], linestyle="none", label=text)


def add_legend(figure: Figure, entries: Sequence[Line2D], title: str = "") -> None:
    """A legend above all panels, in as many columns as the width has room for."""
    if not entries:
        return
    renderer = renderer_of(figure)
    widths = []
    for handle in [Line2D([], [], label=f"{title}:")] * bool(title) + list(entries):
        text = figure.text(0, 0, str(handle.get_label()))
        pixels = text.get_window_extent(renderer).width
        widths.append(pixels * POINTS_PER_INCH / figure.dpi + 3.2 * FONT_SIZE)
        text.remove()
    room = figure.get_figwidth() * POINTS_PER_INCH - 12
    every = list(entries)
    is_one_line = _legend_width(widths, len(widths)) <= room
    if title and is_one_line:
        every.insert(0, Line2D([], [], linestyle="none", label=f"{title}:"))
    columns = len(every)
    while columns > 1 and _legend_width(widths[-len(every) :], columns) > room:
        columns -= 1
    figure.legend(
        handles=every,
        loc="outside upper center",
        ncols=columns,
        borderpad=0.1,
        title=f"{title}:" if title and not is_one_line else None,
        title_fontsize=FONT_SIZE,
        alignment="left",
    )
    lines = -(-len(every) // columns) + bool(title and not is_one_line)
    figure.set_figheight(figure.get_figheight() + 0.16 * (lines - 1))


def _legend_width(widths: Sequence[float], columns: int) -> float:
    """The width in points of a legend whose entries run down its columns."""
    lines, longer = divmod(len(widths), columns)
    sizes = [lines + 1] * longer + [lines] * (columns - longer)
    starts = [sum(sizes[:index]) for index in range(columns)]
    parts = [widths[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return sum(map(max, parts)) + 1.4 * FONT_SIZE * (len(parts) - 1)


def finish(figure: Figure) -> Figure:
    """Lays the figure out and takes away ticks that would collide."""
    break_labels(figure)
    fix_ticks(figure)
    figure.draw_without_rendering()  # with the ticks that remain
    figure.set_layout_engine("none")  # what follows, such as labels, moves nothing
    return figure


def draw_runs(
    axes: Axes,
    groups: Sequence[Group],
    x: str,
    y: str,
    look: Look,
    links: bool,
) -> list[PathCollection]:
    """A dot for each run, pale where a mean stands next to it; returns the pale dots."""
    pale = []
    for group in groups:
        found = [
            (px, py, row.get("run_id"))
            for row in group.rows
            if (px := number_in(row, x)) is not None and (py := number_in(row, y)) is not None
        ]
        if not found:
            continue
        several = len(found) > 1
        dots = axes.scatter(
            [px for px, _, _ in found],
            [py for _, py, _ in found],
            s=7 if several else 16,
            marker=look.marker,
            color=look.color,
            alpha=0.45 if several else 1.0,
            linewidths=0,
            zorder=3,
        )
        if links:
            dots.set_urls([None if run is None else f"#run-{run}" for _, _, run in found])
        if several:
            pale.append(dots)
    return pale
