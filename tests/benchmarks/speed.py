"""How often faster than the reference's code a preset runs, with the same weights.

    python tests/benchmarks/speed.py --reference SReT [--preset sret_s] [--batch-size 8] [--compile]

Inference (fused, in inference mode) and a training step (forward, backward, AdamW) of both, in
alternating rounds. `--compile` compiles ours pass by pass; the reference stays as its users run
it. On CUDA both run under bf16 autocast, and ours in CUDA graphs where it is compiled.
"""

import torch
from common import (
    arguments,
    deep_reference,
    peak_flops,
    prepare,
    reference_module,
    side_by_side,
)

from sret_cli.cost.timing import inference_function, training_step
from sret_cli.cost.trace import trace_costs
from sret_cli.model.compile import compile_model
from sret_cli.model.sret import build_model
from sret_cli.spec.presets import PRESETS
from sret_cli.weights.convert import load_reference

NAMES = {"sret_t": "SReT_T", "sret_lt": "SReT_LT", "sret_s": "SReT_S"}


def main() -> None:
    """Prints images per second and the ratios."""
    parser = arguments(__doc__, reference=True)
    parser.add_argument("--preset", choices=NAMES, default="sret_s")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--inference-only", action="store_true")
    parser.add_argument("--layers", type=int, help="1000, say: the reference's depth is set so too")
    given = parser.parse_args()
    device, batch = given.device, given.batch_size
    print(prepare(device))
    spec = PRESETS[given.preset]
    if given.layers:
        spec = spec.at(layers=given.layers)
        theirs = deep_reference(reference_module(given.reference), spec).to(device)
    else:
        theirs = getattr(reference_module(given.reference), NAMES[given.preset])().to(device)
    ours = build_model(spec)
    if not given.layers:  # beyond two recursions the reference takes other slices
        load_reference(ours, {k: v.cpu() for k, v in theirs.state_dict().items()})
    ours.to(device)
    x = torch.randn(batch, 3, 224, 224, device=device)
    precision = "bf16" if device == "cuda" else "fp32"
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    kind = "compiled" if given.compile else "eager"
    fused = inference_function(ours, x, precision, "on" if given.compile else "off")
    theirs.eval()

    def their_inference() -> None:
        with torch.inference_mode(), autocast:
            theirs(x)

    ratio = side_by_side(their_inference, fused, device, given.rounds)
    report(f"inference, {kind}", ratio, batch, trace_costs(spec).macs, device)
    if given.inference_only:
        return
    theirs.train(), ours.train()
    compile_model(ours, "on" if given.compile else "off")
    target = torch.randint(1000, (len(x),), device=device)
    their_step, our_step = (training_step(m, x, target, precision)[0] for m in (theirs, ours))
    ratio = side_by_side(their_step, our_step, device, given.rounds)
    report(f"training step, {kind}", ratio, batch, 3 * trace_costs(spec).macs, device)


def report(what, ratio, batch, macs, device):
    """Prints a ratio, images per second and the share of the device's peak that they mean."""
    speed = batch / ratio.second_seconds
    share = 2 * macs * speed / peak_flops(device)
    print(f"{what}: {ratio}; {speed:.1f} images/s, {100 * share:.0f} % of the measured peak")


if __name__ == "__main__":
    main()
