"""Texts next to points, each where it covers no other text and no other point."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from sret_cli.report.plot_axes import renderer_of
from sret_cli.report.plot_style import SMALL_SIZE

DOT = 4.6  # pixels at 100 dpi from the centre of a point to its edge
DISTANCE = 7.0  # likewise from the centre of a point to its text
SIDES = (
    *(("left", "bottom", 0.7, 0.7), ("right", "bottom", -0.7, 0.7)),
    *(("left", "top", 0.7, -0.7), ("right", "top", -0.7, -0.7)),
    *(("center", "bottom", 0, 1.1), ("center", "top", 0, -1.1)),
    *(("left", "center", 1.2, 0), ("right", "center", -1.2, 0)),
)


@dataclass(frozen=True)
class Label:
    """A text for a point, in the units of the axes."""

    x: float
    y: float
    text: str
    color: str


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[Label], points: Sequence[tuple[float, float]]
) -> int:
    """Writes labels in their order, and leaves out those without room; returns how many stand.

    The figure must have its final layout.

    Args:
        figure: the figure.
        axes: the panel.
        labels: texts, the most important first.
        points: all points of the panel, which no text may cover.
    """
    renderer = renderer_of(figure)
    taken = []
    for point in points:
        x, y = axes.transData.transform(point)
        taken.append(Bbox([[x - DOT, y - DOT], [x + DOT, y + DOT]]))
    inside, count = axes.get_window_extent(renderer), 0
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        text = axes.text(label.x, label.y, label.text, fontsize=SMALL_SIZE, color=label.color)
        if (box := _room(text, (x, y), inside, taken, axes, figure)) is None:
            text.remove()
        else:
            taken.append(box)
            count += 1
    return count


def _room(
    text: Text,
    at: tuple[float, float],
    inside: Bbox,
    taken: Sequence[Bbox],
    axes: Axes,
    figure: Figure,
) -> Bbox | None:
    """Moves a text to the first side of its point that is free; returns its place, if any."""
    renderer = renderer_of(figure)
    for horizontal, vertical, right, up in SIDES:
        place = (at[0] + right * DISTANCE, at[1] + up * DISTANCE)
        text.set(
            position=axes.transData.inverted().transform(place),
            horizontalalignment=horizontal,
            verticalalignment=vertical,
        )
        box = text.get_window_extent(renderer)
        fits = inside.x0 <= box.x0 and box.x1 <= inside.x1
        fits = fits and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if fits and not any(box.overlaps(other) for other in taken):
            return box
    return None
