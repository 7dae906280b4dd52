"""A heat map: the mean of a column over two fields."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sret_cli.report.columns import COLUMNS, VARYING, heading
from sret_cli.report.groups import Group, group_seeds, series_fields, series_key
from sret_cli.report.plot_axes import TICK_GAP, number_text
from sret_cli.report.plot_intervals import seeds_text
from sret_cli.report.plot_lines import drawable, mean_of, sentence, words_for
from sret_cli.report.plot_panels import How, drawing, label_panels, make_panels
from sret_cli.report.plot_series import ordered, panel_keys, value_text
from sret_cli.report.plot_style import SMALL_SIZE, short_labels
from sret_cli.spec.run import Row

MOST_CELLS = 14  # along an axis, beyond which cells have no numbers
MOST_MAPS = 6


def heat_fields(rows: Sequence[Row]) -> list[str]:
    """The fields that can be axes: those with most values first, but last what no map can label."""
    groups = group_seeds(rows)
    fields = ["layers", *(f for f in series_fields(groups, "layers") if f not in ("name", "role"))]
    counts = {f: len({series_key(group.first, [f]) for group in groups}) for f in fields}
    few = sorted((f for f in fields if 1 < counts[f] <= MOST_CELLS), key=lambda f: -counts[f])
    return few + [f for f in fields if counts[f] > MOST_CELLS]


def map_panels(rows: Sequence[Row], x: str, y: str) -> list[tuple[str, list[Group]]]:
    """The groups of each map, with its title: one for each role and other field that varies."""
    groups = group_seeds(rows)
    fields = [f for f in series_fields(groups, x) if f != y]
    if not _follows(groups, [x, y], "layers") and "layers" not in fields:
        fields.append("layers")
    for field in list(fields):
        if _follows(groups, [x, y, *(f for f in fields if f != field)], field):
            fields.remove(field)
    made = []
    for texts, members in panel_keys(groups, fields):
        title = ", ".join(f"{heading(f)}: {t}" for f, t in zip(fields, texts, strict=True))
        made.append((short_labels([title.replace("Role: ", "")], 44)[0], members))
    return made


def _follows(groups: Sequence[Group], known: Sequence[str], field: str) -> bool:
    pairs = {(series_key(g.first, known), series_key(g.first, [field])) for g in groups}
    return len(pairs) == len({key for key, _ in pairs})


def draw_heat_map(rows: Sequence[Row], x: str, y: str, column: str, how: How) -> tuple[Figure, str]:
    """A map for each setting: cells of the mean of a column, with one scale of colours."""
    rows = [r for r in drawable(rows, column, column) if r.get(x) is not None]
    rows = [r for r in rows if r.get(y) is not None]
    every = map_panels(rows, x, y)
    shown = every[:MOST_MAPS]
    groups = [group for _, members in shown for group in members]
    means = {id(g): found[0] for g in groups if (found := mean_of(g, column, how.interval))}
    low, high = min(means.values()), max(means.values())
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    xs, ys = (_values(groups, field) for field in (x, y))
    with drawing():
        figure, panels = make_panels(
            len(shown),
            how.width,
            share_x=True,
            share_y=True,
            aspect=min(max(0.25 + 0.12 * len(ys), 0.5), 1.1),
        )
        for axes, (title, members) in zip(panels, shown, strict=True):
            axes.set_title(title)
            cells = np.full((len(ys), len(xs)), np.nan)
            for group in members:
                if id(group) in means:
                    at = _place(group, y, ys), _place(group, x, xs)
                    cells[at] = means[id(group)]
            mesh = axes.pcolormesh(
                np.ma.masked_invalid(cells),
                cmap="cividis",
                vmin=low,
                vmax=high,
                edgecolors="white",
                linewidth=0.6,
            )
            axes.grid(False)
            axes.set_facecolor("0.94")  # of cells without a result
            for side in ("left", "bottom"):
                axes.spines[side].set_visible(False)
            axes.set_xticks([i + 0.5 for i in range(len(xs))], [text for _, text in xs])
            axes.set_yticks([i + 0.5 for i in range(len(ys))], [text for _, text in ys])
            axes.tick_params(length=0)
            if max(len(xs), len(ys)) <= MOST_CELLS:
                _write_numbers(axes, cells, column, low, high)
        label_panels(panels, heading(x), heading(y))
        bar = figure.colorbar(mesh, ax=panels, pad=0.02, fraction=0.05, aspect=25)
        bar.set_label(heading(column))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        bar.ax.yaxis.set_major_formatter(lambda value, _: number_text(round(value, 9)))
        _fit(figure, panels)
    parts = [
        f"{sentence(words_for(column))} by {words_for(x)} and {words_for(y)}: means over seeds."
        if column in VARYING
        else f"{sentence(words_for(column))} by {words_for(x)} and {words_for(y)}.",
        seeds_text(groups, [column]) if column in VARYING else "",
        "Light grey cells have no result." if np.isnan(cells).any() else "",
        f"{len(every) - MOST_MAPS} maps are left out." if len(every) > MOST_MAPS else "",
    ]
    return figure, " ".join(part for part in parts if part)


def _values(groups: Sequence[Group], field: str) -> list[tuple[str, str]]:
    """The values of a field in their order: a key that is equal for equal values, and a text."""
    found: dict[str, str] = {}
    for group in ordered(groups, [field]):
        found.setdefault(series_key(group.first, [field]), value_text(group.first, field))
    return list(zip(found, short_labels(list(found.values()), 14), strict=True))


def _place(group: Group, field: str, values: Sequence[tuple[str, str]]) -> int:
    return [key for key, _ in values].index(series_key(group.first, [field]))


def _write_numbers(axes: Axes, cells: Any, column: str, low: float, high: float) -> None:
    decimals = min(COLUMNS[column].decimals, 1 if high >= 10 else 2) if column in COLUMNS else 2
    shades = matplotlib.colormaps["cividis"]
    for (line, place), value in np.ndenumerate(cells):
        if np.isnan(value):
            continue
        red, green, blue, _ = shades((value - low) / (high - low))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            place + 0.5,
            line + 0.5,
            f"{value:,.{decimals}f}",
            ha="center",
            va="center",
            fontsize=SMALL_SIZE,
            color="white" if is_dark else "black",
        )


def _fit(figure: Figure, panels: Sequence[Axes]) -> None:
    """Lays the figure out; takes away numbers that are wider than their cells."""
    figure.draw_without_rendering()
    for axes in panels:
        _thin_labels(axes)
        columns = axes.get_xlim()[1] - axes.get_xlim()[0]
        room = axes.get_window_extent().width / columns
        texts = list(axes.texts)
        if texts and max(text.get_window_extent().width for text in texts) > room - 2:
            for text in texts:
                text.remove()
    figure.set_layout_engine("none")


def _thin_labels(axes: Axes) -> None:
    """Keeps each second or third label where all would collide."""
    for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
        labels = [text for text in axis.get_ticklabels() if text.get_visible()]
        places, texts = list(axis.get_majorticklocs()), [text.get_text() for text in labels]
        boxes = [text.get_window_extent() for text in labels]
        spans = [(box.x0, box.x1) if side == 0 else (box.y0, box.y1) for box in boxes]
        step = 1
        while step < len(spans) and not _has_room(spans[::step]):
            step += 1
        if step > 1:
            axis.set_ticks(places[::step], texts[::step])


def _has_room(spans: Sequence[tuple[float, float]]) -> bool:
    return all(one[1] + TICK_GAP <= other[0] for one, other in pairwise(spans))
