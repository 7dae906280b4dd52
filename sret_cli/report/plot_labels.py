"""Texts next to points, each where it covers no other text and can be of no other point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.patheffects import Stroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from sret_cli.report.plot_axes import renderer_of
from sret_cli.report.plot_style import SMALL_SIZE

DOT = 4.6  # pixels at 100 dpi from the centre of a point to its edge
NEARER = 2.5  # how much nearer a text is to its own point than to any other, in such pixels
HALO = 1.6  # points, of the white edge of texts
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


class HaloText(Text):
    """A text with a thin white edge, which is real text in files, unlike one with path effects."""

    def draw(self, renderer: RendererBase) -> None:
        """Draws the edge, and the text on it."""
        self.set_path_effects([Stroke(linewidth=HALO, foreground="white")])
        super().draw(renderer)
        self.set_path_effects([])
        super().draw(renderer)


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[Label], points: Sequence[tuple[float, float]]
) -> int:
    """Writes labels in their order, and leaves out those without room; returns how many stand.

    A text that would be as near to a point of another text as to its own is left out as well. The
    figure must have its final layout.

    Args:
        figure: the figure.
        axes: the panel.
        labels: texts, the most important first.
        points: all points of the panel, which no text may cover.
    """
    renderer = renderer_of(figure)
    places = [tuple(axes.transData.transform(point)) for point in points]
    taken = [Bbox([[x - DOT, y - DOT], [x + DOT, y + DOT]]) for x, y in places]
    texts: dict[tuple[float, float], set[str]] = {}
    for label in labels:
        texts.setdefault((label.x, label.y), set()).add(label.text)
    inside, count = axes.get_window_extent(renderer), 0
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        others = [
            place
            for point, place in zip(points, places, strict=True)
            if texts.get(point, set()) != {label.text} and point != (label.x, label.y)
        ]
        if len(texts[label.x, label.y]) > 1:  # points that coincide
            continue
        text = HaloText(label.x, label.y, label.text, fontsize=SMALL_SIZE, color=label.color)
        axes.add_artist(text)
        if (box := _room(text, (x, y), inside, taken, others, axes, figure)) is None:
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
    others: Sequence[tuple[float, float]],
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
        if not fits or any(box.overlaps(other) for other in taken):
            continue
        nearest = min((_distance(box, other) for other in others), default=math.inf)
        if _distance(box, at) + NEARER <= nearest:
            return box
    return None


def _distance(box: Bbox, point: tuple[float, float]) -> float:
    """How far a point is from the edge of a box."""
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
