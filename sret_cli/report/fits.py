"""Laws fitted to what runs measured, with intervals.

Each law is linear in some of its parameters once the exponents are given, so it is fitted by
variable projection (Golub and Pereyra, SIAM Journal on Numerical Analysis 10 (1973), 413-432):
`scipy.optimize.least_squares` searches the exponents from many starts, and the other parameters are
solved exactly at each of them. Residuals are relative, with a Huber loss by reweighting. Intervals
come from a bootstrap that draws settings, and seeds within a setting, with replacement; it keeps
the weights of the fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls

from sret_cli.report.columns import heading
from sret_cli.report.groups import group_seeds
from sret_cli.report.laws import LAWS, Law, Values, inputs_of
from sret_cli.runtime.errors import DATA, USAGE, SretError, nearest_choice
from sret_cli.spec.run import Row

LEAST_SETTINGS = 4
DECADE = 10.0  # largest over smallest value of an input that a law has an exponent of
STARTS = 4  # of the grid's best points, refined
HUBER = 1.345  # times the residuals' scale: 95 % as efficient as least squares on normal noise
REWEIGHTINGS = 50
TOLERANCE = 1e-9  # of exponents between two reweightings
MOST_STEPS = 200  # of one search
DRAWS = 400  # of the bootstrap
WHOLE = 0.9  # share of the searched range beyond which an interval says nothing
LAW_Y = {"test_loss": "test_loss", "error": "top1_percent"}


@dataclass(frozen=True)
class Fit:
    """The parameters of a law that are nearest to measurements.

    Attributes:
        parameters: coefficients and exponents, in the law's order.
        residuals: predicted over measured, less 1.
        weights: of the measurements, by the Huber loss.
        loss: the Huber loss of the residuals.
        has_converged: whether the search settled within the range that was searched.
    """

    parameters: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray
    loss: float
    has_converged: bool


@dataclass(frozen=True)
class FittedLaw:
    """A law with the parameters that fit some rows.

    Attributes:
        name: name of the law in `LAWS`.
        law: the law.
        x: the column that it is over, if it takes one.
        y: what it describes: "test_loss", or "error", which is 100 minus top-1 in percent.
        inputs: what it takes of each run, by name `[runs]`.
        measured: `y` of each run `[runs]`.
        fit: its parameters.
        intervals: the 95 % interval of each parameter, by name.
        settings: the number of settings behind it.
        drawn: parameters of the bootstrap's fits `[draws, parameters]`.
    """

    name: str
    law: Law
    x: str
    y: str
    inputs: Values
    measured: np.ndarray
    fit: Fit
    intervals: Mapping[str, tuple[float, float]]
    settings: int
    drawn: np.ndarray

    def is_determined(self, parameter: str) -> bool:
        """Whether the interval of an exponent is smaller than the range that was searched."""
        if parameter not in self.law.exponents:
            return True
        low, high, _ = self.law.exponents[parameter]
        ends = self.intervals[parameter]
        return ends[1] - ends[0] < WHOLE * (high - low)

    def lines(self) -> list[str]:
        """What was found, in sentences: the interval of each parameter before its value."""
        about = f"{self.y} = {self.law.formula} ({self.law.source})"
        lines = [f"{about}, fitted to {len(self.measured)} runs of {self.settings} settings."]
        for name, value in zip(self.law.parameters, self.fit.parameters, strict=True):
            low, high = self.intervals[name]
            if self.is_determined(name):
                lines.append(f"{name}: {low:.3g} to {high:.3g} (95 %), best {value:.3g}.")
            else:
                lines.append(
                    f"The data do not determine {name}: its 95 % interval, {low:.3g} to "
                    f"{high:.3g}, spans nearly everything that was searched."
                )
        largest = 100 * np.abs(self.fit.residuals).max()
        lines.append(f"The largest residual is {largest:.2g} % of the measured value.")
        if not self.fit.has_converged:
            lines.append("The search did not settle: an exponent is at the end of its range.")
        return lines


def fit_rows(
    rows: Sequence[Row], name: str, x: str = "layers", y: str = "test_loss", seed: int = 0
) -> FittedLaw:
    """Fits a law to rows.

    Args:
        rows: what runs measured; runs that failed or lack an input do not count.
        name: power, exponential, chinchilla or recurrence.
        x: the column that the first two laws are over, such as layers, params, macs or images_seen.
        y: "test_loss", or "error": 100 minus top-1 in percent.
        seed: of the bootstrap.

    Raises:
        SretError: no such law, fewer than 4 settings, an input spans less than a decade, or a value
            is not above 0.
    """
    if name not in LAWS:
        raise SretError(f"law {name!r}: {nearest_choice(name, list(LAWS))}", USAGE)
    if y not in LAW_Y:
        raise SretError(f"law of {y!r}: {nearest_choice(y, list(LAW_Y))}", USAGE)
    law = LAWS[name]
    found = []
    for row in rows:
        value = row.get(LAW_Y[y])
        taken = None if value is None or row.get("error") else inputs_of(row, law, x)
        if taken is not None and value is not None:
            found.append((row, taken, 100 - value if y == "error" else value))
    groups = group_seeds([row for row, _, _ in found])
    number = {id(row): index for index, group in enumerate(groups) for row in group.rows}
    labels = [number[id(row)] for row, _, _ in found]
    names = {*law.inputs, *law.spans}
    inputs = {key: np.array([taken[key] for _, taken, _ in found]) for key in names}
    measured = np.array([value for _, _, value in found], dtype=float)
    _check(law, inputs, measured, len(groups), x)
    best = fit(law, inputs, measured)
    drawn = bootstrap(law, inputs, measured, labels, best, seed=seed)
    ends = np.percentile(drawn, [2.5, 97.5], axis=0).T
    intervals = {
        key: (float(low), float(high))
        for key, (low, high) in zip(law.parameters, ends, strict=True)
    }
    return FittedLaw(
        name=name,
        law=law,
        x=x,
        y=y,
        inputs=inputs,
        measured=measured,
        fit=best,
        intervals=intervals,
        settings=len(groups),
        drawn=drawn,
    )


def _check(law: Law, inputs: Values, measured: np.ndarray, settings: int, x: str) -> None:
    """Raises if measurements are too few or too near to each other for a law.

    Raises:
        SretError: what is missing.
    """
    if settings < LEAST_SETTINGS:
        raise SretError(
            f"{settings} settings have all that the law takes ({', '.join(law.inputs)}); "
            f"it needs at least {LEAST_SETTINGS}",
            DATA,
        )
    if not (measured > 0).all() or any(not (values > 0).all() for values in inputs.values()):
        raise SretError("a law needs values above 0 of all that it takes", DATA)
    for name in law.spans:
        low, high = inputs[name].min(), inputs[name].max()
        if high < DECADE * low * (1 - 1e-9) and name != "r":
            shown = heading(x) if name == "x" else name
            raise SretError(
                f"{shown} goes from {low:g} to {high:g}, {high / low:.1f} times; a law needs one "
                "decade, 10 times",
                DATA,
            )
    if "r" in law.inputs and len(np.unique(inputs["r"])) < 3:
        raise SretError("the law of recurrence needs at least 3 recursion counts", DATA)
    if "D" in law.inputs and len(np.unique(inputs["D"])) < 2:
        raise SretError("the law needs at least 2 amounts of data (images seen)", DATA)


def fit(law: Law, inputs: Values, y: np.ndarray, starts: np.ndarray | None = None) -> Fit:
    """Fits a law; `starts` are exponents `[starts, exponents]`, by a grid if None."""
    if starts is None:
        axes = [np.linspace(low, high, n) for low, high, n in law.exponents.values()]
        grid = np.array(list(product(*axes)))
        losses = [np.square(_project(law, inputs, y, point, None)[1]).sum() for point in grid]
        starts = grid[np.argsort(losses)[:STARTS]]
    return min((_refine(law, inputs, y, start) for start in starts), key=lambda f: f.loss)


def bootstrap(
    law: Law,
    inputs: Values,
    y: np.ndarray,
    settings: Sequence[int],
    best: Fit,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Parameters `[draws, parameters]` of fits to settings, and seeds in them, drawn again."""
    generator, labels = np.random.default_rng(seed), np.asarray(settings)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    start = _inside(law, best.parameters[len(law.coefficients) :])
    found = []
    for _ in range(draws):
        chosen = [members[i] for i in generator.integers(0, len(members), len(members))]
        rows = np.concatenate([generator.choice(places, len(places)) for places in chosen])
        drawn = {name: values[rows] for name, values in inputs.items()}
        exponents = _search(law, drawn, y[rows], start, best.weights[rows], 1e-8)[0]
        coefficients = _project(law, drawn, y[rows], exponents, best.weights[rows])[0]
        found.append(np.concatenate([coefficients, exponents]))
    return np.array(found)


def _project(
    law: Law, inputs: Values, y: np.ndarray, exponents: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The best coefficients at some exponents, and the relative residuals, times root weights."""
    design = law.design(inputs, exponents) / y[:, None]
    target = np.ones(len(y))
    if weights is not None:
        root = np.sqrt(weights)
        design, target = design * root[:, None], root
    size = np.linalg.norm(design, axis=0)
    size[size == 0] = 1.0
    coefficients = np.linalg.lstsq(design / size, target, rcond=None)[0]
    if not law.is_signed and (coefficients < 0).any():
        coefficients = nnls(design / size, target)[0]
    return coefficients / size, design @ (coefficients / size) - target


def _bounds(law: Law) -> tuple[np.ndarray, np.ndarray]:
    low, high = zip(*((low, high) for low, high, _ in law.exponents.values()), strict=True)
    return np.array(low), np.array(high)


def _inside(law: Law, exponents: np.ndarray) -> np.ndarray:
    low, high = _bounds(law)
    return np.clip(exponents, low + 1e-6, high - 1e-6)


def _search(
    law: Law,
    inputs: Values,
    y: np.ndarray,
    start: np.ndarray,
    weights: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, bool]:
    """The exponents near a start with the smallest residuals, and whether the search settled."""
    found = least_squares(
        lambda exponents: _project(law, inputs, y, exponents, weights)[1],
        start,
        bounds=_bounds(law),
        xtol=tolerance,
        ftol=tolerance,
        gtol=tolerance,
        max_nfev=MOST_STEPS,
    )
    return found.x, found.status > 0


def _refine(law: Law, inputs: Values, y: np.ndarray, start: np.ndarray) -> Fit:
    """A fit from one start: searches that alternate with new weights, until they settle."""
    exponents, weights = _inside(law, start), np.ones(len(y))
    has_settled, parameters, residuals, scale = False, np.array([]), np.zeros(len(y)), 0.0
    for _ in range(REWEIGHTINGS):
        before = exponents
        exponents, has_ended = _search(law, inputs, y, _inside(law, exponents), weights, 1e-12)
        coefficients = _project(law, inputs, y, exponents, weights)[0]
        parameters = np.concatenate([coefficients, exponents])
        residuals = law.predict(inputs, parameters) / y - 1
        scale = 1.4826 * float(np.median(np.abs(residuals)))
        has_settled = bool(np.abs(exponents - before).max() < TOLERANCE or scale < 1e-9)
        if has_settled and has_ended:
            break
        sizes = np.maximum(np.abs(residuals), 1e-300)
        weights = np.minimum(1.0, HUBER * max(scale, 1e-12) / sizes)
    low, high = _bounds(law)
    is_inside = bool(((exponents > low + 1e-5) & (exponents < high - 1e-5)).all())
    sizes, bound = np.abs(residuals), max(HUBER * scale, 1e-12)
    loss = float(np.where(sizes < bound, sizes**2 / 2, bound * (sizes - bound / 2)).sum())
    return Fit(parameters, residuals, weights, loss, has_settled and is_inside)
