"""The look of figures: sizes for papers, fonts, colours, markers and dashes, and plain text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

from sret_cli.spec.run import BASELINE, SHARED, twin_role

WIDTHS = {"column": 3.25, "page": 6.75}  # inches, of one column and of both in a paper
FONT_SIZE, SMALL_SIZE = 8, 7  # points
MOST_SERIES = 8  # in one panel
LONGEST_LABEL = 34  # characters

# Okabe and Ito, "Color Universal Design" (2008), without their yellow, which is faint on white.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#7F7F7F"),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = (
    *("-", (0, (4, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2))),
    *((0, (7, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (7, 1.5, 2, 1.5))),
)
GREY = "0.45"


@dataclass(frozen=True)
class Look:
    """How a series is drawn."""

    color: str
    marker: str
    dash: Any  # a line style of Matplotlib


ROLE_LOOKS = {
    role: Look(COLORS[index], MARKERS[index], DASHES[index])
    for role, index in (
        (SHARED, 0),
        (twin_role("layers"), 1),
        (twin_role("params"), 2),
        (twin_role("macs"), 3),
        (BASELINE, 6),
    )
}


def nominal_looks(count: int) -> list[Look]:
    """Looks of series without an order; from the ninth on they repeat, in another panel."""
    return [Look(COLORS[i % 8], MARKERS[i % 8], DASHES[i % 8]) for i in range(count)]


def ordered_looks(count: int) -> list[Look]:
    """Looks of series in the order of a number: from dark to light, as `viridis` without yellow."""
    shades = matplotlib.colormaps["viridis"]
    places = [0.78 * i / max(count - 1, 1) for i in range(count)]
    return [
        Look(matplotlib.colors.to_hex(shades(place)), MARKERS[i % 8], DASHES[i % 8])
        for i, place in enumerate(places)
    ]


def crossed_looks(keys: Sequence[tuple[str, str]]) -> list[Look]:
    """Looks of series by two fields: colour by the first, tint and marker by the second.

    Each has a dash of its own, so that lines that coincide can be seen.
    """
    first, second = (list(dict.fromkeys(key[i] for key in keys)) for i in (0, 1))
    looks = []
    for index, (one, other) in enumerate(keys):
        base = ROLE_LOOKS.get(one) or nominal_looks(8)[first.index(one) % 8]
        tint = 0.55 * second.index(other) / max(len(second) - 1, 1)
        red, green, blue = matplotlib.colors.to_rgb(base.color)
        pale = tuple(1 - (1 - part) * (1 - tint) for part in (red, green, blue))
        color = matplotlib.colors.to_hex((pale[0], pale[1], pale[2]))
        looks.append(Look(color, MARKERS[second.index(other) % 8], DASHES[index % 8]))
    return looks


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib's settings for every figure, whatever the user's own are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": "sans-serif",
                # The first comes with Matplotlib; the others are for SVGs in browsers without it.
                "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica Neue", "Arial"],
                "font.size": FONT_SIZE,
                "axes.labelsize": FONT_SIZE,
                "axes.titlesize": FONT_SIZE,
                "axes.titlelocation": "left",
                "axes.titlepad": 4,
                "axes.labelpad": 3,
                "axes.linewidth": 0.6,
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.formatter.useoffset": False,
                "grid.color": "0.9",
                "grid.linewidth": 0.5,
                "xtick.labelsize": FONT_SIZE,
                "ytick.labelsize": FONT_SIZE,
                "xtick.major.width": 0.6,
                "ytick.major.width": 0.6,
                "xtick.major.size": 2.5,
                "ytick.major.size": 2.5,
                "legend.fontsize": FONT_SIZE,
                "legend.frameon": False,
                "legend.handlelength": 2.6,
                "legend.handletextpad": 0.5,
                "legend.columnspacing": 1.4,
                "lines.linewidth": 1.1,
                "lines.markersize": 4,
                "hatch.linewidth": 0.4,
                "text.parse_math": False,  # names may have dollar signs
                "pdf.fonttype": 42,  # embeds TrueType fonts
                "svg.fonttype": "none",  # text stays text
                "svg.hashsalt": "sret",
                "savefig.dpi": 300,
                "figure.dpi": 100,
            }
        )
        yield


def plain(text: object) -> str:
    """Any text as one line of characters that can be printed."""
    line = " ".join(str(text).split())
    return "".join(c for c in line if c.isprintable() and not "\ud800" <= c <= "\udfff")


def shorten(text: str, longest: int = LONGEST_LABEL, *, middle: bool = False) -> str:
    """A text of at most some characters, with an ellipsis for what is left out."""
    if len(text) <= longest:
        return text
    if not middle:
        return text[: longest - 1].rstrip() + "…"
    tail = (longest - 1) // 2
    return text[: longest - 1 - tail] + "…" + text[-tail:]


def short_labels(texts: Sequence[str], longest: int = LONGEST_LABEL) -> list[str]:
    """Texts for a legend: one line each, shortened, and different where the texts are."""
    lines = [plain(text) for text in texts]
    labels = [shorten(line, longest) for line in lines]
    if len(set(labels)) < len(set(lines)):
        labels = [shorten(line, longest, middle=True) for line in lines]
    found: Counter[str] = Counter()
    for index, label in enumerate(labels):
        found[label] += 1
        if found[label] > 1:
            labels[index] = f"{label} ({found[label]})"
    return labels
