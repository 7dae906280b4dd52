"""Predicted and seen peak memory of training steps and of inference.

    python tests/benchmarks/memory.py                     training: depths, slices, batches
    python tests/benchmarks/memory.py --inference         every preset, batches of 1 to 256
    python tests/benchmarks/memory.py --inference --most-gigabytes 2

Claims: training steps within 10 %, inference within 2 %. Inference is that of the model as
`sret eval` runs it, not of its fused copy. Combinations that are predicted to need more than
`--most-gigabytes` are left out.

Seen is what `sret profile --device` measures: `torch.cuda.max_memory_allocated` where there is a
CUDA device; elsewhere the weights, optimizer state, batch, and the most that torch allocated on top
of them. The last line has the largest error.
"""

import argparse
import itertools
import time

import torch
import torch.nn.functional as F
from common import prepare

from sret_cli.cost.footprint import Setting
from sret_cli.cost.memory import predict_memory
from sret_cli.cost.plan import Plan
from sret_cli.cost.timing import peak_memory_bytes
from sret_cli.model.sret import build_model
from sret_cli.runtime.device import choose_device
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import PRESETS


def measured(spec: ModelSpec, setting: Setting, plan: Plan) -> int:
    """The most bytes that a training step has at once, the second after a first."""
    device = torch.device(setting.device)
    model = build_model(spec).to(device)
    model.set_recompute(*plan)
    optimizer = torch.optim.AdamW(model.parameters())
    size = (setting.batch_size, spec.in_chans, spec.img_size, spec.img_size)
    x = torch.randn(size, device=device)
    target = torch.zeros(setting.batch_size, dtype=torch.long, device=device)
    bf16 = setting.precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(x)
        F.cross_entropy(output.float(), target, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    batch = x.nbytes + target.nbytes if device.type == "cpu" else 0
    return peak_memory_bytes(step, model, optimizer, device) + batch


def measured_inference(spec: ModelSpec, setting: Setting) -> int:
    """The most bytes that the second of two batches of evaluation has at once."""
    device = torch.device(setting.device)
    model = build_model(spec).to(device).eval()
    size = (setting.batch_size, spec.in_chans, spec.img_size, spec.img_size)
    x = torch.randn(size, device=device)
    target = torch.zeros(setting.batch_size, dtype=torch.long, device=device)
    bf16 = setting.precision == "bf16"

    def evaluate() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        ):
            model(x)

    evaluate()
    batch = x.nbytes + target.nbytes if device.type == "cpu" else 0
    return peak_memory_bytes(evaluate, model, None, device) + batch


def main() -> None:
    """Prints a line for each combination."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--most-gigabytes", type=float, default=6.0)
    parser.add_argument("--presets", default=",".join(PRESETS), help="for --inference")
    arguments = parser.parse_args()
    device = choose_device("auto").type
    if arguments.inference:
        compare_inference(device, arguments.presets.split(","), arguments.most_gigabytes * 1e9)
    else:
        compare_training(device)


def compare_inference(device: str, presets: list[str], most_bytes: float) -> None:
    """Prints a line for each preset, batch and precision."""
    print(prepare(device))
    print("| preset | batch | precision | predicted | seen (MB) | ratio |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    ratios, left_out = [], 0
    for name, batch, precision in itertools.product(presets, (1, 2, 8, 64, 256), ("fp32", "bf16")):
        setting = Setting(batch, precision, device)
        predicted = predict_memory(PRESETS[name], setting)[0].inference_memory_bytes
        if predicted > most_bytes:
            left_out += 1
            continue
        seen = measured_inference(PRESETS[name], setting)
        ratios.append(predicted / seen)
        line = f"| {name} | {batch} | {precision} | {predicted / 1e6:,.2f} | {seen / 1e6:,.2f} "
        print(f"{line}| {ratios[-1]:.4f} |", flush=True)
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(f"{len(ratios)} combinations, at most {100 * worst:.2f} % off; {left_out} left out")


def compare_training(device: str) -> None:
    """Prints a line for each depth, number of slices, batch and kind of recomputation."""
    batches, depths = ((2, 8), (20, 100)) if device == "cpu" else ((32, 128), (20, 200))
    print(prepare(device))
    print("| layers | slices | batch | precision | recompute | predicted | seen (MB) | ratio |")
    print("| ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |")
    ratios, start = [], time.perf_counter()
    for layers, slices, (batch, precision), recompute in itertools.product(
        depths, (1, 4), zip(batches, ("fp32", "bf16"), strict=True), ("none", 4, "auto")
    ):
        spec = PRESETS["sret_t"].at(layers=layers, slices=slices)
        setting = Setting(batch, precision, device)
        memory, plan = predict_memory(spec, setting, recompute)
        seen, predicted = measured(spec, setting, plan), memory.training_memory_bytes
        ratios.append(predicted / seen)
        line = f"| {layers} | {slices} | {batch} | {precision} | {recompute} "
        line += f"| {predicted / 1e6:,.1f} | {seen / 1e6:,.1f} | {ratios[-1]:.3f} |"
        print(line, flush=True)
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(f"{len(ratios)} combinations, at most {100 * worst:.1f} % off", end="; ")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
