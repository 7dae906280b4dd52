"""The intervals of a figure: bands, bars, and what stands for those that the axis cannot hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from sret_cli.report.columns import COLUMNS, heading
from sret_cli.report.groups import Group
from sret_cli.report.intervals import BANDS
from sret_cli.report.plot_axes import IS_ACCURACY, number_in, number_text, set_y_axis

WIDE = {
    "ci95": "95 % intervals (Student's t)",
    "sd": "Sample standard deviations",
    "sem": "Standard errors",
}
ARROW_SIZE = 16  # square points
BAND_ALPHA = 0.15


@dataclass(frozen=True)
class Bar:
    """The interval of a point, as a vertical bar."""

    axes: Axes
    x: float
    low: float
    high: float
    color: str


@dataclass
class Intervals:
    """The intervals of one column in a figure.

    Attributes:
        kind: one of `intervals.KINDS`.
        column: what the intervals are of.
        ends: the lower and upper ends.
        bars: the intervals that are drawn as bars.
        bands: the places, lower and upper ends of each band.
        runs: the dots of runs that have a mean next to them.
        is_hidden: whether they are not drawn because the axis would cut one off.
        is_cut: whether the axis cuts off a bar.
    """

    kind: str
    column: str
    ends: list[float] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    bands: list[tuple[Axes, list[float], list[float], list[float], str]] = field(
        default_factory=list
    )
    runs: list[PathCollection] = field(default_factory=list)
    widest: float = 0.0
    is_hidden: bool = False
    is_cut: bool = False

    def add(self, mean: float, half_width: float) -> tuple[float, float]:
        """Counts an interval; returns its ends."""
        low, high = mean - half_width, mean + half_width
        self.ends += [low, high]
        self.widest = max(self.widest, half_width)
        return low, high

    def draw_or_hide(
        self, panels: Sequence[Axes], values: Sequence[float], test_images: int | None = None
    ) -> None:
        """Scales the shared y axis of panels, and draws all intervals if the axis can hold them.

        If it would cut one off, none is drawn, and the dots of runs are larger and darker.
        """
        if set_y_axis(panels[0], self.column, values, self.ends, test_images):
            self.is_hidden = True
            set_y_axis(panels[0], self.column, values, (), test_images)
            for dots in self.runs:
                dots.set_sizes([12])
                dots.set_alpha(0.75)
            return
        for axes, places, lows, highs, color in self.bands:
            axes.fill_between(places, lows, highs, color=color, alpha=BAND_ALPHA, linewidth=0)
        for bar in self.bars:
            self._draw_bar(bar)

    def draw_bars(self, alpha: float = 1.0) -> None:
        """Draws all bars on scaled axes; those that an axis cuts off end with an arrow head."""
        for bar in self.bars:
            self._draw_bar(bar, alpha)
            bottom, top = bar.axes.get_ylim()
            for is_cut, edge, marker in ((bar.high > top, 1, "^"), (bar.low < bottom, 0, "v")):
                if is_cut:
                    self.is_cut = True
                    bar.axes.scatter(
                        [bar.x],
                        [edge],
                        s=ARROW_SIZE,
                        marker=marker,
                        color=bar.color,
                        linewidths=0,
                        clip_on=False,
                        transform=bar.axes.get_xaxis_transform(),
                        zorder=3.5,
                    )

    def _draw_bar(self, bar: Bar, alpha: float = 1.0) -> None:
        bar.axes.errorbar(
            [bar.x],
            [(bar.low + bar.high) / 2],
            yerr=[(bar.high - bar.low) / 2],
            fmt="none",
            ecolor=bar.color,
            elinewidth=0.8,
            capsize=2,
            alpha=alpha,
        )

    def text(self, groups: Sequence[Group], columns: Sequence[str] = ()) -> str:
        """How many seeds points have, and what bands and bars are, or why there are none."""
        seeds = seeds_text(groups, columns or [self.column])
        if self.is_hidden:
            return (
                f"{WIDE[self.kind]} over {seeds.rstrip('.')} are up to ±{self._widest_text()} "
                "and not drawn; the table has them."
            )
        names = ["band"] * bool(self.bands) + ["bars"] * bool(self.bars)
        if not names:
            return seeds
        cut = " An arrow head marks a bar that is longer than the axis." if self.is_cut else ""
        name = {"band": "Band", "bars": "Bars"}.get(" and ".join(names), "Bands and bars")
        return f"{seeds} {name}: {BANDS[self.kind]}.{cut}"

    def _widest_text(self) -> str:
        decimals = COLUMNS[self.column].decimals if self.column in COLUMNS else 3
        is_plain = 10**-decimals <= self.widest < 1e6
        text = f"{self.widest:,.{decimals}f}" if is_plain else number_text(self.widest)
        unit = heading(self.column).partition("(")[2].rstrip(")")
        unit = "points" if self.column in IS_ACCURACY else unit
        return f"{text} {unit} wide" if unit else f"{text} wide"


def seeds_text(groups: Sequence[Group], columns: Sequence[str]) -> str:
    """How many seeds the points have: "3 seeds", "2–3 seeds"; for single runs "one run each"."""
    counts = {
        sum(number_in(row, column) is not None for row in group.rows)
        for group in groups
        for column in columns
    } - {0}
    if not counts or counts == {1}:
        return "One run at each point."
    low, high = min(counts), max(counts)
    return f"{high} seeds." if low == high else f"{low}–{high} seeds."
