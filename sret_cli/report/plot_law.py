"""A fitted law: its curve with a band, or measured over predicted values, and the residuals."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sret_cli.report.columns import COLUMNS, heading
from sret_cli.report.fits import FittedLaw
from sret_cli.report.plot_axes import set_x_axis
from sret_cli.report.plot_panels import drawing, finish, make_panels
from sret_cli.report.plot_style import COLORS

POINTS = 200  # of a curve
Y_HEADINGS = {"test_loss": "Test loss", "error": "Error (%)"}


def draw_law(found: FittedLaw, width: str) -> tuple[Figure, str]:
    """The figure of a fitted law, and its caption.

    Args:
        found: the law and what it was fitted to.
        width: "column" or "page".
    """
    with drawing():
        figure, (left, right) = make_panels(2, width)
        if found.law.inputs == ("x",):
            _draw_curve(left, found)
        else:
            _draw_predicted(left, found)
        _draw_residuals(right, found)
        finish(figure)
    what = "Left: the fit" if found.law.inputs == ("x",) else "Left: measured over predicted values"
    band = ", its 95 % band by bootstrap," if found.law.inputs == ("x",) else ""
    caption = (
        f"{what}{band} and the runs. Right: residuals, measured over predicted less 1. "
        + " ".join(found.lines())
    )
    return figure, caption


def law_title(found: FittedLaw) -> str:
    """The title of a fitted law."""
    over = f" over {heading(found.x).lower()}" if "x" in found.law.inputs else ""
    return f"{Y_HEADINGS[found.y]}{over}: {found.law.formula}"


def _draw_curve(axes: Axes, found: FittedLaw) -> None:
    x = found.inputs["x"]
    unit = COLUMNS[found.x].divisor if found.x in COLUMNS else 1
    at = np.geomspace(x.min(), x.max(), POINTS)
    curves = np.array([found.law.predict({"x": at}, drawn) for drawn in found.drawn])
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    axes.fill_between(
        at / unit, low, high, color=COLORS[0], alpha=0.18, linewidth=0, label="95 % band"
    )
    axes.plot(
        at / unit, found.law.predict({"x": at}, found.fit.parameters), color=COLORS[0], label="fit"
    )
    axes.scatter(x / unit, found.measured, color=COLORS[1], s=10, zorder=3, label="runs")
    axes.set(xlabel=heading(found.x), ylabel=Y_HEADINGS[found.y])
    set_x_axis(axes, list(x / unit), column=found.x)
    axes.legend(fontsize=7, frameon=False)


def _draw_predicted(axes: Axes, found: FittedLaw) -> None:
    predicted = found.law.predict(found.inputs, found.fit.parameters)
    ends = [
        min(predicted.min(), found.measured.min()),
        max(predicted.max(), found.measured.max()),
    ]
    axes.plot(ends, ends, color="0.6", linewidth=0.8)
    axes.scatter(predicted, found.measured, color=COLORS[1], s=10, zorder=3)
    name = Y_HEADINGS[found.y]
    axes.set(xlabel=f"{name}, predicted", ylabel=f"{name}, measured")


def _draw_residuals(axes: Axes, found: FittedLaw) -> None:
    predicted = found.law.predict(found.inputs, found.fit.parameters)
    axes.axhline(0, color="0.6", linewidth=0.8)
    residuals = 100 * (found.measured / predicted - 1)
    axes.scatter(predicted, residuals, color=COLORS[1], s=10, zorder=3)
    axes.set(xlabel=f"{Y_HEADINGS[found.y]}, predicted", ylabel="Residual (%)")
