"""Small learning curves of one run as SVG, a few kilobytes each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sret_cli.report.page_tables import is_number

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 312, 18, 126  # of the area of the lines
MOST_POINTS = 100  # of a line; more are averaged

Place = tuple[float, float]  # epochs trained, value


def run_curves(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Curves of the losses and of the top-1 accuracy over epochs; none of a single value.

    Args:
        metrics: the lines of the run's `metrics.jsonl`.
    """
    epochs = [line for line in metrics if "step" not in line and is_number(line.get("epoch"))]
    if not epochs:
        return []
    training = _steps(metrics, epochs) or _series(epochs, "train_loss")
    losses = {"training": training, "test": _series(epochs, "test_loss")}
    accuracy = {"test": _series(epochs, "top1_percent")}
    last = max(line["epoch"] for line in epochs)
    panels = [("Loss", losses), ("Top-1 (%)", accuracy)]
    return [
        _panel(title, lines, last)
        for title, lines in panels
        if any(len(places) > 1 for places in lines.values())
    ]


def _series(epochs: Sequence[Mapping[str, Any]], key: str) -> list[Place]:
    return _thinned([(line["epoch"], line[key]) for line in epochs if is_number(line.get(key))])


def _steps(
    metrics: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]
) -> list[Place]:
    """The training loss of the steps of a run with few epochs, whose means would be few points."""
    if len(epochs) >= 10:
        return []
    steps = [line for line in metrics if is_number(line.get("step"))]
    steps = [line for line in steps if is_number(line.get("loss"))]
    if not steps:
        return []
    per_epoch = steps[-1]["step"] / max(line["epoch"] for line in epochs)
    return _thinned([(line["step"] / per_epoch, line["loss"]) for line in steps])


def _thinned(places: list[Place]) -> list[Place]:
    """At most `MOST_POINTS` places: means of equally many that follow each other."""
    size = math.ceil(len(places) / MOST_POINTS)
    parts = [places[i : i + size] for i in range(0, len(places), max(size, 1))]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


def _panel(title: str, lines: Mapping[str, list[Place]], last: float) -> str:
    values = [y for places in lines.values() for _, y in places]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0

    def across(x: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * x / last:.0f}"

    def up(y: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * (y - low) / spread:.0f}"

    ends = ", ".join(f"{name} {places[-1][1]:.4g}" for name, places in lines.items() if places)
    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title} over epochs; at the end: {ends}">',
        f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>',
        f'<text x="{LEFT}" y="11">{title}</text>',
        f'<text class="end" x="{LEFT - 4}" y="{TOP + 5}">{high:.3g}</text>',
        f'<text class="end" x="{LEFT - 4}" y="{BOTTOM}">{low:.3g}</text>' * (high > low),
        f'<text x="{LEFT}" y="{BOTTOM + 15}">0</text>',
        f'<text class="end" x="{RIGHT}" y="{BOTTOM + 15}">{last:g} epoch{"s" * (last != 1)}</text>',
    ]
    legend = RIGHT
    for name, places in reversed(list(lines.items())):
        if not places:
            continue
        if len(places) == 1:
            (x, y) = places[0]
            parts.append(f'<circle class="{name}" cx="{across(x)}" cy="{up(y)}" r="3"/>')
        else:
            points = " ".join(f"{across(x)},{up(y)}" for x, y in places)
            parts.append(f'<polyline class="{name}" points="{points}"/>')
        parts.append(f'<text class="end {name}" x="{legend}" y="11">{name}</text>')
        legend -= 34
    return "".join([*parts, "</svg>"])
