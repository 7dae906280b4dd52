"""Predicted and seen peak memory of training steps, over depths, slices, batches and precisions.

    python tests/benchmarks/memory.py

Seen is what `sret profile --device` measures: `torch.cuda.max_memory_allocated` where there is a
CUDA device; elsewhere the weights, optimizer state, batch, and the most that torch allocated on top
of them. The last line has the largest error.
"""

import itertools
import time

import torch
import torch.nn.functional as F
from common import prepare

from sret_cli.measure import choose_device, peak_memory_bytes
from sret_cli.memory import Plan, Setting, predict
from sret_cli.model import build_model
from sret_cli.spec import PRESETS, ModelSpec


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


def main() -> None:
    """Prints a line for each combination."""
    device = choose_device("auto").type
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
        memory, plan = predict(spec, setting, recompute)
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
