"""How often faster than the reference's code a preset runs, with the same weights.

    python tests/benchmarks/speed.py --reference SReT [--preset sret_s] [--batch-size 8] [--compile]

Inference (fused, in inference mode) and a training step (forward, backward, AdamW) of both, in
alternating rounds. `--compile` compiles ours pass by pass; the reference stays as its users run
it. On CUDA both run under bf16 autocast, and ours in CUDA graphs where it is compiled.
"""

import torch
from common import arguments, prepare, reference_module, side_by_side, training_step

from sret_cli.model import build_model
from sret_cli.profiler import trace
from sret_cli.spec import PRESETS
from sret_cli.weights import load_reference

NAMES = {"sret_t": "SReT_T", "sret_lt": "SReT_LT", "sret_s": "SReT_S"}


def main() -> None:
    """Prints images per second and the ratios."""
    parser = arguments(__doc__, reference=True)
    parser.add_argument("--preset", choices=NAMES, default="sret_s")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    device, batch = given.device, given.batch_size
    print(prepare(device))
    theirs = getattr(reference_module(given.reference), NAMES[given.preset])().to(device)
    spec = PRESETS[given.preset]
    ours = build_model(spec)
    load_reference(ours, {k: v.cpu() for k, v in theirs.state_dict().items()})
    ours.to(device)
    x = torch.randn(batch, 3, 224, 224, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    if given.compile:
        ours.compile_passes()

    theirs.eval(), ours.eval()
    fused = ours.fused()
    if given.compile:
        fused.compile_passes(cuda_graphs=device == "cuda")

    def inference(model: torch.nn.Module):
        def call() -> None:
            with torch.inference_mode(), autocast:
                model(x)

        return call

    ratio = side_by_side(inference(theirs), inference(fused), device, given.rounds)
    kind = "compiled" if given.compile else "eager"
    report(f"inference, {kind}", ratio, batch, trace(spec).macs, device)

    theirs.train(), ours.train()
    ratio = side_by_side(
        training_step(theirs, x, autocast), training_step(ours, x, autocast), device, given.rounds
    )
    report(f"training step, {kind}", ratio, batch, 3 * trace(spec).macs, device)


def report(what, ratio, batch, macs, device):
    """Prints a ratio, images per second and the share of the device's peak that they mean."""
    speed = batch / ratio.second_seconds
    share = 2 * macs * speed / peak_flops(device)
    print(f"{what}: {ratio}; {speed:.1f} images/s, {100 * share:.0f} % of the measured peak")


def peak_flops(device: str) -> float:
    """Operations a second (two a multiply-add) of large matrix products, the best of ten."""
    from common import seconds

    size = 8192 if device == "cuda" else 2048
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=kind)
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


if __name__ == "__main__":
    main()
