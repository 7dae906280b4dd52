"""Cost over depth: parameters, FLOPs, memory and measured time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from sret_cli.report.columns import heading
from sret_cli.report.groups import SEED, Group, group_seeds, setting
from sret_cli.report.plot_axes import number_in, set_x_axis
from sret_cli.report.plot_intervals import Intervals
from sret_cli.report.plot_lines import draw_series, drawable, legend_entries, line_caption
from sret_cli.report.plot_panels import How, add_legend, drawing, finish, label_panels, make_panels
from sret_cli.report.plot_series import MOST_PANELS, arrange, split_fields
from sret_cli.spec.contents import CONTENTS_OF
from sret_cli.spec.run import Row

# Fields of a training that change what a step costs.
HOW_TRAINED = ("batch_size", "accumulation", "opt", "precision", "recompute", "compile")


def cost_columns(rows: Sequence[Row], x: str) -> list[str]:
    """The costs that rows have: parameters, FLOPs, memory (measured, else counted) and time."""
    found = ["params", "macs"]
    memory = "peak_memory_bytes" if drawable(rows, x, "peak_memory_bytes") else "activation_bytes"
    found += [memory, "step_seconds"]
    if not drawable(rows, x, "step_seconds"):
        found[-1] = "forward_seconds"
    return [column for column in found if drawable(rows, x, column)]


def cost_rows(rows: Sequence[Row], x: str, columns: Sequence[str]) -> list[Row]:
    """One row for each model, and for each measurement of it: without the rest of the training."""
    kept = {x, *columns, *(f"train.{field}" for field in HOW_TRAINED)}
    dropped = {name for names in CONTENTS_OF.values() for name in names}
    made: dict[tuple[object, ...], Row] = {}
    numbers: Counter[str] = Counter()
    for row in rows:
        cost = {
            key: value
            for key, value in row.items()
            if key not in dropped and (not key.startswith("train.") or key in kept)
        }
        model = setting(cost)
        key = (model, *(number_in(row, column) for column in columns))
        if key not in made:
            made[key] = {**cost, SEED: numbers[model]}
            numbers[model] += 1
    return list(made.values())


def draw_cost(rows: Sequence[Row], x: str, columns: Sequence[str], how: How) -> tuple[Figure, str]:
    """A panel for each cost over x, with a line for each series."""
    how = replace(how, interval="none")  # runs that differ in more than their seed are one cost
    rows = [row for row in rows if any(drawable([row], x, column) for column in columns)]
    return draw_columns(group_seeds(cost_rows(rows, x, columns)), x, columns, how)


def draw_columns(
    groups: Sequence[Group], x: str, columns: Sequence[str], how: How
) -> tuple[Figure, str]:
    """A panel for each column over x, with a line for each series, and its caption."""
    groups = [g for g in groups if any(drawable(g.rows, x, column) for column in columns)]
    rows = [row for group in groups for row in group.rows]
    lead, rest = split_fields(groups, x, how.group)
    plan = arrange(groups, x, [*lead, *rest])
    places = [(panel, column) for panel in plan.panels for column in columns][:MOST_PANELS]
    every: list[Intervals] = []
    with drawing():
        figure, panels = make_panels(len(places), how.width, share_x=True)
        for axes, (panel, column) in zip(panels, places, strict=True):
            every.append(Intervals(how.interval, column))
            for series in panel.series:
                draw_series(axes, series, x, column, how, every[-1])
            shown = [row for series in panel.series for g in series.groups for row in g.rows]
            set_x_axis(axes, [n for row in rows if (n := number_in(row, x)) is not None], x)
            values = [n for row in shown if (n := number_in(row, column)) is not None]
            every[-1].draw_or_hide([axes], values)
            axes.set_title(panel.title)
            axes.set_ylabel(heading(column))
        label_panels(panels, heading(x))
        add_legend(figure, legend_entries(plan), plan.legend_title)
        finish(figure)
    told = max(every, key=lambda found: (found.is_hidden, bool(found.ends)))
    return figure, line_caption(groups, x, columns, told, plan)
