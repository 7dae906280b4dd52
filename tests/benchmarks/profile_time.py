"""How long profiling takes at any depth, after imports, and against a full trace.

    python tests/benchmarks/profile_time.py [--full] [--reference SReT]

Parameters, MACs, activations and bytes kept for the backward pass of `deep`, with nothing traced
before; then of 200 specs of other depths and widths together. `--full` also traces the unrolled
model of 1,000 layers, whose totals must be the same to the unit; `--reference` the reference's.
"""

import statistics

import torch
from common import arguments, deep_reference, prepare, reference_module, seconds

from sret_cli.cost.module_costs import count_module
from sret_cli.cost.trace import _traced, trace_costs
from sret_cli.model.sret import build_model
from sret_cli.spec.presets import PRESETS

LAYERS = (20, 100, 1000, 10_000)


def cold(layers: int) -> float:
    """Seconds of one profile with nothing traced before."""
    _traced.clear()
    spec = PRESETS["deep"].at(layers=layers)
    return seconds(lambda: trace_costs(spec))


def main() -> None:
    """Prints seconds and ratios."""
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--reference", type=reference_module)
    given = parser.parse_args()
    print(prepare("cpu"))
    cold(20)
    rounds = [[cold(layers) for layers in LAYERS] for _ in range(given.rounds)]
    for layers, times in zip(LAYERS, zip(*rounds, strict=True), strict=True):
        print(f"{layers:6,} layers: {spread(times)} s")
    print(f"10,000 layers over 100: {spread([times[3] / times[1] for times in rounds])}")
    _traced.clear()
    specs = [
        PRESETS[name].with_values(mlp_ratio=ratio).at(layers=20 * depth)
        for name in ("sret_t", "deep")
        for ratio in (2.0, 2.5, 3.0, 3.5, 4.0)
        for depth in range(1, 21)
    ]
    print(f"{len(specs)} specs of 10 widths: {seconds(lambda: [*map(trace_costs, specs)]):.1f} s")
    spec = PRESETS["sret_t"].at(layers=1000)
    image = torch.zeros(1, 3, 224, 224)
    if given.full:
        model = build_model(spec)
        taken = seconds(lambda: count_module(model, image))
        whole, ours = count_module(model, image), trace_costs(spec)
        same = (whole.macs, whole.activations, whole.params) == (
            ours.macs,
            ours.activations,
            ours.params,
        )
        print(f"full trace of 1,000 layers of sret_t: {taken:.1f} s; equal to the unit: {same}")
    if given.reference:
        model = deep_reference(given.reference, spec)
        taken = seconds(lambda: count_module(model, image))
        print(f"full trace of 1,000 layers of the reference: {taken:.1f} s")


def spread(values) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
