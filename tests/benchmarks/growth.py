"""Whether time grows in proportion to layers, from 20 to 10,000.

    python tests/benchmarks/growth.py [--img-size 64]

Forward pass and training step of `deep` at batch 1, in alternating rounds; deep training steps
recompute, segments of 20 passes at every depth, or 10,000 layers would not fit. The fixed part
(stem, pools, head, optimizer) and the time of a layer are those of the line with the least relative
errors; each depth's error is printed.
"""

import gc
import statistics

import numpy as np
import torch
from common import arguments, prepare, seconds

from sret_cli.cost.timing import training_step
from sret_cli.model.sret import build_model
from sret_cli.spec.presets import PRESETS

LAYERS = (20, 100, 1000, 10_000)


def main() -> None:
    """Prints times, and how far each depth is off the line through all."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--img-size", type=int, default=64)
    given = parser.parse_args()
    print(prepare(given.device))
    device = given.device
    x = torch.randn(1, 3, given.img_size, given.img_size, device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    spec = PRESETS["deep"].with_values(
        img_size=given.img_size, slices=1, recursive_slices=1, residual="loop"
    )
    models = [build_model(spec.at(layers=layers)).to(device) for layers in LAYERS]
    for model in models:
        model.set_recompute((20,) * 3)
    for what, calls in (
        ("forward pass", [forward(model, x) for model in models]),
        ("training step", [training_step(model, x, target, "fp32")[0] for model in models]),
    ):
        for model in models:
            model.train(what == "training step")
        for call in calls:
            call()
        gc.collect()
        gc.disable()  # as training does: each collection looks at all passes of the graph
        rounds = [[seconds(call, device) for call in calls] for _ in range(given.rounds)]
        gc.enable()
        times = [statistics.median(each) for each in zip(*rounds, strict=True)]
        weights = np.array([[1 / t, n / t] for n, t in zip(LAYERS, times, strict=True)])
        fixed, layer = np.linalg.lstsq(weights, np.ones(len(LAYERS)))[0]
        print(f"{what}: {1e3 * fixed:.3g} ms fixed, {1e3 * layer:.3g} ms a layer")
        for layers, taken in zip(LAYERS, times, strict=True):
            off = (taken - fixed) / (layers * layer) - 1
            print(f"{layers:6,} layers: {taken:.3f} s, {100 * off:+.0f} % off proportion")


def forward(model, x):
    """A call of the forward pass alone."""

    def call() -> None:
        with torch.inference_mode():
            model(x)

    return call


if __name__ == "__main__":
    main()
