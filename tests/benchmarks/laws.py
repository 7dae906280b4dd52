"""How well the law of recurrence is found again in synthetic data of 60 runs with 1 % of noise.

    python tests/benchmarks/laws.py [--draws 200]

Two widths, five recursion counts, three amounts of data and two seeds, with phi = 0.46. Prints the
errors of phi, how often its 95 % interval covers the truth, and the seconds of a fit with interval.
"""

import argparse
import statistics
import time

import numpy as np

from sret_cli.report.fits import bootstrap, fit
from sret_cli.report.laws import LAWS

WIDTHS, RECURSIONS, IMAGES, SEEDS = (5e4, 8e5), (1, 2, 4, 8, 16), (2e4, 1e5, 5e5), 2
TRUTH = np.array([0.3, 60.0, 10.0, 0.30, 0.28, 0.46])  # E, A, B, alpha, beta, phi


def main() -> None:
    """Prints errors, coverage and seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draws", type=int, default=200)
    given = parser.parse_args()
    law = LAWS["recurrence"]
    settings = [(w, 3 * w, r, d) for w in WIDTHS for r in RECURSIONS for d in IMAGES]
    values = np.repeat(np.array(settings, dtype=float), SEEDS, axis=0)
    inputs = dict(zip(law.inputs, values.T, strict=True))
    labels = np.repeat(np.arange(len(settings)), SEEDS)
    exact = law.predict(inputs, TRUTH)
    found = fit(law, inputs, exact)
    print(f"{len(labels)} runs; without noise phi is off by {abs(found.parameters[-1] - 0.46):.1e}")
    errors, covered, widths, seconds = [], 0, [], []
    for draw in range(given.draws):
        noise = np.random.default_rng(draw).standard_normal(len(exact))
        y = exact * (1 + 0.01 * noise)
        start = time.perf_counter()
        found = fit(law, inputs, y)
        drawn = bootstrap(law, inputs, y, labels, found, seed=draw)[:, -1]
        seconds.append(time.perf_counter() - start)
        low, high = np.percentile(drawn, [2.5, 97.5])
        covered += low <= 0.46 <= high
        widths.append(high - low)
        errors.append(found.parameters[-1] - 0.46)
    sizes = np.abs(errors)
    print(
        f"phi: error {np.sqrt(np.mean(np.square(errors))):.4f} (rms), {sizes.max():.4f} (largest), "
        f"at most 0.03 in {100 * np.mean(sizes <= 0.03):.1f} % of {given.draws} draws"
    )
    print(
        f"95 % interval: covers the truth in {100 * covered / given.draws:.1f} %, "
        f"width {np.mean(widths):.3f}"
    )
    print(f"fit with interval: {statistics.median(seconds):.1f} s (largest {max(seconds):.1f} s)")


if __name__ == "__main__":
    main()
