"""Figures as files: PNG, SVG with real text and PDF with its fonts. Equal rows give equal bytes."""

import io
import re
from pathlib import Path

from matplotlib.collections import Collection
from matplotlib.figure import Figure

from sret_cli.report.plot_panels import drawing
from sret_cli.runtime.files import write_atomically

# Without the time of writing, and with the title under the name that each format has for it.
METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": "sret"},
    "svg": {"Date": None, "Creator": "sret"},
    "pdf": {"CreationDate": None, "Creator": "sret", "Producer": "sret"},
}


LINK = re.compile(rb' *<a xlink:href="#run-[^"]*"[^>]*>\n?| *</a>\n?')


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """A figure in a format; the size is that of the figure, and no margin is cut off."""
    data = io.BytesIO()
    metadata = dict(METADATA[suffix])
    if title := str(figure.get_label() or ""):
        metadata["Title"] = title
    with drawing():
        figure.savefig(data, format=suffix, metadata=metadata)
    return data.getvalue()


def write_figure(figure: Figure, stem: Path) -> tuple[list[Path], str]:
    """Writes a figure as PNG, SVG and PDF, reproducible to the byte.

    The layout is computed once, and is the same in each format. Links of dots to runs are not
    written, since what they lead to is not in these files.

    Returns:
        The files, and the `<svg>` element for a page, with the links and with text as text.
    """
    with drawing():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    svg = figure_bytes(figure, "svg")
    for drawn in figure.findobj(Collection):
        drawn.set_urls([None])
    files = []
    for suffix in METADATA:
        files.append(stem.with_name(f"{stem.name}.{suffix}"))
        data = LINK.sub(b"", svg) if suffix == "svg" else figure_bytes(figure, suffix)
        write_atomically(files[-1], data)
    text = svg.decode("utf-8")
    return files, text[text.index("<svg") :]


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PNG, SVG and PDF, reproducible to the byte; returns the files."""
    return write_figure(figure, stem)[0]


def svg_text(figure: Figure) -> str:
    """A figure as the `<svg>` element for a page, with text as text."""
    text = figure_bytes(figure, "svg").decode("utf-8")
    return text[text.index("<svg") :]
