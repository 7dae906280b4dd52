"""What recomputation in segments saves and costs, at 20 and at 1,000 layers.

    python tests/benchmarks/recompute.py [--rounds 5] [--batch-size 1]

sret_t at 224 px in fp32. Kept: the bytes for the backward pass of one image, boundaries and the
largest segment under recomputation, as predicted to the byte. Time: training steps (forward and
backward) with and without recomputation in turn, so that a slow spell of the machine hits both;
the ratio is that of each round, printed as median and quartiles, of wall time and, beside it, of
processor time, which other programs disturb less. 1,000 layers without recomputation keep 2.4 GB
an image; the machine must not swap.
"""

import argparse
import statistics
import time

import torch
from common import prepare

from sret_cli.cost.footprint import Setting
from sret_cli.cost.memory import predict_memory
from sret_cli.cost.plan import Plan, fixed_plan
from sret_cli.model.sret import SReT, build_model
from sret_cli.runtime.device import choose_device
from sret_cli.spec.presets import PRESETS


def seconds(model: SReT, plan: Plan, x: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Wall and processor time of one step's forward and backward pass."""
    model.set_recompute(*plan)
    wall, processor = time.perf_counter(), time.process_time()
    torch.nn.functional.cross_entropy(model(x), target).backward()
    model.zero_grad(set_to_none=True)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Prints a line for each depth and plan."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    device = choose_device("auto")
    setting = Setting(arguments.batch_size, "fp32", device.type)
    x = torch.randn(arguments.batch_size, 3, 224, 224, device=device)
    target = torch.zeros(arguments.batch_size, dtype=torch.long, device=device)
    print(prepare(device.type))
    print("| layers | recompute | kept (MB/image) | step (s) | wall, over none | processor |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for layers in (20, 1000):
        spec = PRESETS["sret_t"].at(layers=layers)
        model = build_model(spec).to(device)
        names = ("none", "auto", "pass")
        plans = {name: predict_memory(spec, setting, name)[1] for name in names}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for plan in (plans["auto"], fixed_plan(spec, "none")):
            seconds(model, plan, x, target)
        for _ in range(arguments.rounds):
            for name in names:
                times[name].append(seconds(model, plans[name], x, target))
        for name in names:
            kept = predict_memory(spec, setting, name)[0].kept_bytes / arguments.batch_size / 1e6
            line = (
                f"| {layers:,} | {name}, {'-'.join(map(str, plans[name].segments))} | {kept:.1f} "
            )
            line += f"| {statistics.median(wall for wall, _ in times[name]):.2f} "
            for kind in (0, 1):
                pairs = zip(times[name], times["none"], strict=True)
                low, middle, high = statistics.quantiles([a[kind] / b[kind] for a, b in pairs], n=4)
                line += f"| {middle:.2f} ({low:.2f} to {high:.2f}) "
            print(line + "|", flush=True)


if __name__ == "__main__":
    main()
