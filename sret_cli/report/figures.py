"""The figures of a report: which of them rows allow, and what stands next to each.

The kinds are drawn by the files `plot_*.py`, and by `curves.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from sret_cli.report.columns import heading
from sret_cli.report.curves import CURVES, curve_of, draw_curves, rows_with_curves
from sret_cli.report.groups import group_seeds
from sret_cli.report.plot_axes import number_in
from sret_cli.report.plot_cost import cost_columns, draw_columns, draw_cost
from sret_cli.report.plot_files import save_figure, svg_text, write_figure
from sret_cli.report.plot_heat import MOST_CELLS, draw_heat_map, heat_fields
from sret_cli.report.plot_iso import draw_iso, iso_panels
from sret_cli.report.plot_lines import draw_line_figure, drawable, sentence, words_for
from sret_cli.report.plot_panels import Drawn, How
from sret_cli.report.plot_pareto import draw_pareto, pareto_columns
from sret_cli.report.plot_rates import draw_rates
from sret_cli.report.plot_sharing import draw_sharing, sharing_pairs
from sret_cli.runtime.errors import DATA, USAGE, SretError
from sret_cli.spec.run import Row
from sret_cli.study.view import FigureSpec, Kind, ReportSpec
from sret_cli.study.where import rows_where

__all__ = ["Drawn", "draw_figures", "plot_rows", "save_figure", "svg_text", "write_figure"]

MOST_FIGURES = 6  # that are chosen by the data, besides columns of `y`
COSTS = ("params", "macs", "activations", "activation_bytes", "peak_memory_bytes")
Metrics = Mapping[str, Sequence[dict]]


@dataclass(frozen=True)
class Task:
    """What a kind is drawn from."""

    rows: Sequence[Row]
    figure: FigureSpec
    report: ReportSpec
    metrics: Metrics
    how: How

    @property
    def y(self) -> str:
        """The column that the figure is about."""
        return self.figure.y or "top1_percent"

    def refusal(self, reason: str, needed: str) -> SretError:
        """Why the rows do not allow the figure, and what it would need."""
        return SretError(f"figure {self.figure.kind!r}: {reason}; it needs {needed}", DATA)


Made = tuple[str, Figure, str]  # title, figure, caption


def draw_figures(
    rows: Sequence[Row],
    spec: ReportSpec,
    metrics: Metrics = {},  # noqa: B006
    links: bool = False,
) -> list[Drawn]:
    """The figures that a spec asks for, or without any those that the rows allow.

    Args:
        rows: what runs measured.
        spec: what the report shows.
        metrics: the lines of `metrics.jsonl` by run id, for learning curves.
        links: whether the dot of a run is a link to `#run-<run_id>`.

    Raises:
        SretError: the rows do not allow a figure that the spec asks for.
    """
    rows = rows_where(rows, spec.where)
    if not spec.figures:
        return _chosen(rows, spec, metrics, links)
    drawn = []
    for figure in spec.figures:
        drawn.append(_draw(rows, figure, spec, metrics, links))
    names = [d.name for d in drawn]
    for name in names:
        if names.count(name) > 1:
            raise SretError(
                f"two figures are named {name!r}; give each [[report.figures]] a `name`", USAGE
            )
    return drawn


def _draw(
    rows: Sequence[Row], figure: FigureSpec, spec: ReportSpec, metrics: Metrics, links: bool
) -> Drawn:
    how = How(
        group=spec.group if figure.group is None else figure.group,
        interval=spec.interval,
        width=spec.width,
        links=links,
        published=spec.published,
    )
    kept = rows_where(rows, figure.where)
    task = Task(kept, figure, spec, metrics, how)
    if not kept:
        condition = f" with {figure.where}" if figure.where else ""
        raise task.refusal(f"there are no rows{condition}", "at least one")
    title, drawn, caption = DRAWN_BY[figure.kind](task)
    title = figure.name or title
    drawn.set_label(f"{title}. {caption}")
    return Drawn(figure.name or figure.kind, figure.kind, title, caption, drawn)


def _chosen(rows: Sequence[Row], spec: ReportSpec, metrics: Metrics, links: bool) -> list[Drawn]:
    """The figures that the rows allow, the most telling first."""
    figures = [FigureSpec(kind="accuracy"), FigureSpec(kind="cost")]
    shown = {"top1_percent", *cost_columns(rows, spec.x)}
    for column in spec.y:
        if column not in shown:
            kind: Kind = "loss" if column.endswith("_loss") else "accuracy"
            kind = "cost" if column in COSTS else kind
            figures.append(FigureSpec.model_construct(kind=kind, y=column, name=column))
            shown.add(column)
    kinds: tuple[Kind, ...] = (
        "sharing",
        "pareto",
        "learning-rate",
        "curves",
        "heat-map",
        "iso-flops",
        "iso-params",
    )
    drawn: list[Drawn] = []
    for figure in [*figures, *(FigureSpec(kind=kind) for kind in kinds)]:
        is_extra = figure in figures
        if not is_extra and (
            len(drawn) >= MOST_FIGURES or not _is_telling(rows, figure.kind, drawn, metrics)
        ):
            continue
        try:
            made = _draw(rows, figure, spec, metrics, links)
        except SretError as error:
            if error.code != DATA:
                raise
            continue
        if figure.name is not None:
            made = replace(made, title=sentence(words_for(made.name)))
        drawn.append(made)
    return drawn


def _is_telling(rows: Sequence[Row], kind: str, drawn: Sequence[Drawn], metrics: Metrics) -> bool:
    """Whether a figure that was not asked for would show more than those before it."""
    done = drawable(rows, "top1_percent", "top1_percent")
    count = len({number_in(row, "train.lr") for row in done})
    if kind == "curves":
        return any(len(curve_of(row, metrics, "top1_percent")) > 2 for row in rows)
    if kind == "pareto":
        return len(group_seeds(done)) > 2
    if kind == "learning-rate":
        return count > 2
    if kind == "heat-map":
        sizes = [len({str(row.get(f)) for row in done}) for f in heat_fields(done)[:2]]
        is_map = len(sizes) == 2 and min(sizes) > 2 and max(sizes) <= MOST_CELLS
        return is_map and "learning-rate" not in {d.kind for d in drawn}
    if kind in ("iso-flops", "iso-params"):
        fixed, x = ISO[kind]
        panels = iso_panels(done, fixed, x, "top1_percent")
        return max((len(levels) for _, levels in panels), default=0) > 1
    return True


def _lines(task: Task) -> Made:
    """Accuracy, loss or another column over depth."""
    x = task.figure.x or task.report.x
    default = "test_loss" if task.figure.kind == "loss" else "top1_percent"
    y = task.figure.y or default
    if not drawable(task.rows, x, y):
        raise task.refusal(
            f"no row has both {heading(x)} and {heading(y)} as numbers", "runs with both"
        )
    figure, caption = draw_line_figure(task.rows, x, y, task.how)
    return sentence(f"{words_for(y)} over {words_for(x)}"), figure, caption


def _cost(task: Task) -> Made:
    x = task.figure.x or task.report.x
    columns = [task.figure.y] if task.figure.y else cost_columns(task.rows, x)
    if not any(drawable(task.rows, x, column) for column in columns):
        raise task.refusal(
            f"no row has a cost and {heading(x)} as numbers", "rows with params or macs"
        )
    figure, caption = draw_cost(task.rows, x, columns, task.how)
    return f"Cost over {words_for(x)}", figure, caption


def _pareto(task: Task) -> Made:
    columns = pareto_columns(task.rows, task.y)
    if task.figure.x:
        columns = [task.figure.x] if drawable(task.rows, task.figure.x, task.y) else []
    if not columns:
        raise task.refusal(
            f"no cost differs between rows with {heading(task.y)}",
            "models of different params, macs, time or memory",
        )
    figure, caption = draw_pareto(task.rows, columns, task.y, task.how)
    return f"{sentence(words_for(task.y))} against cost", figure, caption


def _sharing(task: Task) -> Made:
    if task.y not in ("top1_percent", "test_loss"):
        raise SretError(f"figure 'sharing': y = {task.y!r}; use top1_percent or test_loss", USAGE)
    if not sharing_pairs(task.rows, task.y, task.how.interval):
        raise task.refusal(
            "no shared model has a twin or baseline with the same seed and results",
            'finished runs of a study with twins = ["layers"]',
        )
    figure, caption = draw_sharing(task.rows, task.y, task.how)
    return "Shared models against their controls", figure, caption


ISO = {"iso-params": ("params", "macs"), "iso-flops": ("macs", "params")}


def _iso(task: Task) -> Made:
    fixed, x = ISO[task.figure.kind]
    x = task.figure.x or x
    if not iso_panels(task.rows, fixed, x, task.y):
        raise task.refusal(
            f"no two models have equal {words_for(fixed)} and different {words_for(x)}",
            f"models of equal {words_for(fixed)} (within 2 %), such as twins",
        )
    figure, caption = draw_iso(task.rows, fixed, x, task.y, task.how)
    title = f"{sentence(words_for(task.y))} at equal {words_for(fixed)}"
    return title, figure, caption


def _curves(task: Task) -> Made:
    if task.y not in CURVES:
        raise SretError(
            f"figure 'curves': {task.y} is not measured at each epoch; use {', '.join(CURVES)}",
            USAGE,
        )
    if not rows_with_curves(task.rows, task.metrics, task.y):
        raise task.refusal(
            "no run has metrics of two epochs", "runs with their metrics.jsonl and 2 epochs"
        )
    figure, caption = draw_curves(task.rows, task.metrics, task.y, task.how)
    return "Learning curves", figure, caption


def _rates(task: Task) -> Made:
    x = task.figure.x or "train.lr"
    rows = drawable(task.rows, x, task.y)
    if len({number_in(row, x) for row in rows}) < 2:
        raise task.refusal(
            f"rows with {heading(task.y)} have one {words_for(x)}", "at least two values"
        )
    figure, caption = draw_rates(rows, x, task.y, task.how)
    return f"{sentence(words_for(task.y))} over {words_for(x)}", figure, caption


def _heat_map(task: Task) -> Made:
    column = task.report.y[0] if task.report.y else "top1_percent"
    rows = drawable(task.rows, column, column)
    given = [field for field in (task.figure.x, task.figure.y) if field]
    fields = given + [field for field in heat_fields(rows) if field not in given]
    if len(fields) < 2 or not rows:
        raise task.refusal(
            f"fewer than two fields differ between rows with {heading(column)}",
            "two axes, such as recursions and train.lr",
        )
    x, y = fields[:2]
    figure, caption = draw_heat_map(rows, x, y, column, task.how)
    return f"{sentence(words_for(column))} by {words_for(x)} and {words_for(y)}", figure, caption


def _law(task: Task) -> Made:
    from sret_cli.report.fits import fit_rows
    from sret_cli.report.plot_law import draw_law, law_title

    y = {"top1_percent": "error", None: "test_loss"}.get(task.figure.y, str(task.figure.y))
    found = fit_rows(task.rows, task.figure.law, task.figure.x or task.report.x, y)
    figure, caption = draw_law(found, task.how.width)
    return law_title(found), figure, caption


DRAWN_BY: dict[str, Callable[[Task], Made]] = {
    "accuracy": _lines,
    "loss": _lines,
    "cost": _cost,
    "pareto": _pareto,
    "sharing": _sharing,
    "iso-params": _iso,
    "iso-flops": _iso,
    "curves": _curves,
    "learning-rate": _rates,
    "heat-map": _heat_map,
    "law": _law,
}


def plot_rows(
    rows: Sequence[Row], x: str, columns: Sequence[str], interval: str = "ci95"
) -> Figure:
    """A figure with one panel for each column over x, as for the rows of an evaluation."""
    return draw_columns(group_seeds(rows), x, columns, How(interval=interval))[0]
