"""Accuracy against cost, with the Pareto front and the depths of its models."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sret_cli.report.columns import FLOPS_NOTE, heading
from sret_cli.report.groups import Group, group_seeds, series_key
from sret_cli.report.plot_axes import IS_ACCURACY, number_in, number_text, set_x_axis, set_y_axis
from sret_cli.report.plot_intervals import Bar, Intervals
from sret_cli.report.plot_labels import Label, place_labels
from sret_cli.report.plot_lines import drawable, listed, mean_of, sentence, tested_images, words_for
from sret_cli.report.plot_panels import (
    How,
    add_legend,
    drawing,
    entry,
    finish,
    label_panels,
    make_panels,
    note_entry,
)
from sret_cli.report.plot_series import (
    legend_title,
    ordered,
    series_looks,
    split_fields,
    value_text,
)
from sret_cli.report.plot_style import GREY, Look, plain, short_labels, shorten
from sret_cli.report.published import PUBLISHED_NOTE, PublishedModel, published_models
from sret_cli.spec.run import Row

COSTS = ("params", "macs", "step_seconds", "forward_seconds", "peak_memory_bytes")
MOST_LABELS = 24  # beyond this many points only those of the front have a label
FAMILY_MARKERS = {"SReT": "*", "DeiT": "v", "PiT": "^", "Swin": "P"}


@dataclass(frozen=True)
class Point:
    """A setting in a panel: its cost, the mean of its seeds, and the interval."""

    x: float
    y: float
    half_width: float | None
    group: Group


def pareto_columns(rows: Sequence[Row], y: str) -> list[str]:
    """The costs with at least two different values, at most four; of two timings the first."""
    found = [x for x in COSTS if len({number_in(row, x) for row in drawable(rows, x, y)}) > 1]
    if "step_seconds" in found:
        found = [x for x in found if x != "forward_seconds"]
    return found


def pareto_front(points: Sequence[Point], largest_is_best: bool = True) -> list[Point]:
    """The points that no other point beats in both cost and result, from cheap to expensive."""
    sign = 1 if largest_is_best else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def draw_pareto(
    rows: Sequence[Row], columns: Sequence[str], y: str, how: How
) -> tuple[Figure, str]:
    """A panel for each cost: a point for each setting, and the front of the best."""
    rows = [row for row in rows if any(drawable([row], x, y) for x in columns)]
    groups = group_seeds(rows)
    lead, rest = split_fields(groups, "layers", how.group)
    rest = [field for field in rest if field != "layers"]
    filled = _filled_by(groups, rest)
    looks = series_looks(groups, lead)
    published = published_models() if how.published and y == "top1_percent" else ()
    intervals = Intervals(how.interval, y)
    with drawing():
        figure, panels = make_panels(len(columns), how.width, share_y=True)
        drawn = []
        for axes, x in zip(panels, columns, strict=True):
            points = _points(groups, x, y, how.interval)
            behind = [m for m in published if m.value(x) is not None]
            front = pareto_front(points, y in IS_ACCURACY)
            _draw_published(axes, behind, x)
            _draw_points(
                axes, points, x, y, {k: look for k, (_, look) in looks.items()}, lead, filled, how
            )
            _draw_front(axes, front)
            for point in points:
                if point.half_width is not None:
                    low, high = intervals.add(point.y, point.half_width)
                    color = looks[series_key(point.group.first, lead)][1].color
                    intervals.bars.append(Bar(axes, point.x, low, high, color))
            set_x_axis(axes, [p.x for p in points] + [m.value(x) or 0 for m in behind], x)
            drawn.append((axes, x, points, front, behind))
        values = [n for row in rows if (n := number_in(row, y)) is not None]
        values += [m.top1_percent for m in published if any(b for *_, b in drawn)]
        set_y_axis(panels[0], y, values, intervals.ends, tested_images(rows))
        intervals.draw_bars(alpha=0.35)
        label_panels(panels, "", heading(y))
        for axes, x in zip(panels, columns, strict=True):
            axes.set_xlabel(heading(x))
        entries = [entry(label, look, False) for label, look in looks.values()]
        entries = entries if len(entries) > 1 else []
        if filled:
            entries += _filled_entries(groups, filled)
        entries.append(_front_entry(bool(published)))
        if any(b for *_, b in drawn):
            entries += [
                Line2D([], [], color="0.7", marker=m, linestyle="none", label=f"{name}, published")
                for name, m in FAMILY_MARKERS.items()
            ]
        if any(number_in(group.first, "layers") is not None for group in groups):
            entries.append(note_entry("numbers: layers"))
        add_legend(figure, entries, legend_title(lead) if len(looks) > 1 else "")
        finish(figure)
        for axes, x, points, front, behind in drawn:
            _label(figure, axes, x, points, front, behind)
    alike = [words_for(field) for field in rest if filled is None or field != filled[0]]
    return figure, _caption(groups, columns, intervals, bool(published), alike)


def _points(groups: Sequence[Group], x: str, y: str, interval: str) -> list[Point]:
    made = []
    for group in groups:
        costs = [n for row in group.rows if (n := number_in(row, x)) is not None]
        found = mean_of(group, y, interval)
        if costs and found is not None:
            made.append(Point(sum(costs) / len(costs), *found, group))
    return made


def _draw_points(
    axes: Axes,
    points: Sequence[Point],
    x: str,
    y: str,
    looks: dict[str, Look],
    lead: Sequence[str],
    filled: tuple[str, list[str]] | None,
    how: How,
) -> None:
    for point in points:
        look = looks[series_key(point.group.first, lead)]
        is_hollow = filled is not None and _is_hollow(point.group, filled)
        dot = axes.scatter(
            [point.x],
            [point.y],
            s=12 if is_hollow else 18,
            marker=look.marker,
            facecolors="white" if is_hollow else look.color,
            edgecolors=look.color,
            linewidths=1.0 if is_hollow else 0,
            zorder=4,
        )
        runs = [row.get("run_id") for row in point.group.rows if number_in(row, y) is not None]
        if how.links and runs and runs[0] is not None:
            dot.set_urls([f"#run-{runs[0]}"])


def _draw_front(axes: Axes, front: Sequence[Point]) -> None:
    if len(front) > 1:
        axes.plot(
            [p.x for p in front],
            [p.y for p in front],
            color=GREY,
            linewidth=0.9,
            drawstyle="steps-post",
            zorder=2,
        )
    axes.scatter(
        [p.x for p in front],
        [p.y for p in front],
        s=42,
        facecolors="none",
        edgecolors=GREY,
        linewidths=0.8,
        zorder=5,
    )


def _filled_by(groups: Sequence[Group], fields: Sequence[str]) -> tuple[str, list[str]] | None:
    """The first field with two values, and their keys: points of the second are hollow."""
    for field in fields:
        having = [group for group in ordered(groups, [field]) if group.first.get(field) is not None]
        keys = list(dict.fromkeys(series_key(group.first, [field]) for group in having))
        if len(keys) == 2:
            return field, keys
    return None


def _is_hollow(group: Group, filled: tuple[str, list[str]]) -> bool:
    field, keys = filled
    return series_key(group.first, [field]) == keys[1]


def _filled_entries(groups: Sequence[Group], filled: tuple[str, list[str]]) -> list[Line2D]:
    """Entries of a legend for filled and for hollow points."""
    field, keys = filled
    entries = []
    for key in keys:
        group = next(g for g in groups if series_key(g.first, [field]) == key)
        (label,) = short_labels([f"{heading(field)}: {value_text(group.first, field)}"])
        face = GREY if key == keys[0] else "white"
        made = entry(label, Look(GREY, "o", "-"), False)
        made.set(markerfacecolor=face, markeredgecolor=GREY)
        entries.append(made)
    return entries


def _front_entry(is_own: bool) -> Line2D:
    return Line2D(
        [],
        [],
        color=GREY,
        linewidth=0.9,
        marker="o",
        markersize=6,
        markerfacecolor="none",
        markeredgewidth=0.8,
        label="Pareto front of these runs" if is_own else "Pareto front",
    )


def _draw_published(axes: Axes, models: Sequence[PublishedModel], x: str) -> None:
    for model in models:
        axes.scatter(
            [model.value(x) or 0.0],
            [model.top1_percent],
            s=14,
            marker=FAMILY_MARKERS.get(model.family, "o"),
            color="0.7",
            linewidths=0,
            zorder=1.5,
        )


def _label(
    figure: Figure,
    axes: Axes,
    x: str,
    points: Sequence[Point],
    front: Sequence[Point],
    behind: Sequence[PublishedModel],
) -> None:
    """Writes the depths next to the points of the front, then next to others with room."""
    others = [p for p in points if p not in front] if len(points) <= MOST_LABELS else []
    labels = [
        Label(p.x, p.y, text, color)
        for color, members in (("black", front), (GREY, others))
        for p in members
        if (text := _depth_text(p.group))
    ]
    labels += [Label(m.value(x) or 0, m.top1_percent, m.model, "0.55") for m in behind]
    places = [(p.x, p.y) for p in points] + [(m.value(x) or 0, m.top1_percent) for m in behind]
    place_labels(figure, axes, labels, places)


def _depth_text(group: Group) -> str:
    """The layers of a setting; for a model without depth its name."""
    layers = number_in(group.first, "layers")
    if layers is not None:
        return number_text(layers)
    return shorten(plain(group.first.get("name") or ""), 14)


def _caption(
    groups: Sequence[Group],
    columns: Sequence[str],
    intervals: Intervals,
    published: bool,
    alike: Sequence[str],
) -> str:
    costs = listed(map(words_for, columns))
    parts = [
        f"{sentence(words_for(intervals.column))} against {costs}; numbers at points are layers. "
        "No other model is cheaper and better than one on the Pareto front.",
        intervals.text(groups),
    ]
    if alike:
        parts.append(f"Points that look alike may differ in {listed(alike)}.")
    if published:
        sources = dict.fromkeys(m.source.partition(",")[0] for m in published_models())
        parts.append(f"{PUBLISHED_NOTE} ({'; '.join(sources)}).")
    if "macs" in columns:
        parts.append(FLOPS_NOTE)
    return " ".join(part for part in parts if part)
