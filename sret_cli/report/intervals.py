"""Means of seeds with their intervals, and the interval of an accuracy that was measured once."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("ci95", "sd", "sem", "none")
CAPTIONS = {
    "ci95": "±: 95 % confidence interval of the mean over seeds (Student's t)",
    "sd": "±: sample standard deviation over seeds",
    "sem": "±: standard error of the mean over seeds",
    "none": "means over seeds",
}
BANDS = {
    "ci95": "95 % confidence interval of the mean over seeds (Student's t)",
    "sd": "one sample standard deviation over seeds to each side",
    "sem": "standard error of the mean over seeds to each side",
    "none": "none",
}
Z95 = 1.959963984540054  # quantile 0.975 of the normal distribution


class Spread(NamedTuple):
    """The mean of some values, the half-width of its interval (None: unknown), their number."""

    mean: float
    half_width: float | None
    n: int


def spread(values: Sequence[float], kind: str = "ci95") -> Spread:
    """The mean of values and the half-width of its interval; for one value there is no interval."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2 or kind == "none":
        return Spread(mean, None, n)
    deviation = statistics.stdev(values)
    if kind == "sd":
        return Spread(mean, deviation, n)
    error = deviation / math.sqrt(n)
    return Spread(mean, error if kind == "sem" else error * t_quantile(n - 1), n)


def t_quantile(degrees: int) -> float:
    """The quantile 0.975 of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def wilson(percent: float, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy in percent on a number of test images.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    p, z2 = percent / 100, Z95**2
    centre = (p + z2 / (2 * images)) / (1 + z2 / images)
    half = Z95 / (1 + z2 / images) * math.sqrt(p * (1 - p) / images + z2 / (4 * images**2))
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)
