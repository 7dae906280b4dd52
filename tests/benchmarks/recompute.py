"""What recomputation in segments saves and costs, at 20 and at 1,000 layers.

    python tests/benchmarks/recompute.py [--rounds 5] [--batch-size 1]

sret_t at 224 px in fp32. Kept: the bytes for the backward pass of one image, boundaries and the
largest segment under recomputation, as predicted to the byte. Time: training steps (forward and
backward) with and without recomputation in turn, so that a slow spell of the machine hits both;
the ratio is that of each round, printed as median and quartiles. 1,000 layers without recomputation
keep 2.4 GB an image; the machine must not swap.
"""

import argparse
import statistics
import time

import torch
from machine import describe

from sret_cli.measure import choose_device
from sret_cli.memory import Plan, Setting, fixed_plan, predict
from sret_cli.model import SReT, build_model
from sret_cli.spec import PRESETS


def seconds(model: SReT, plan: Plan, x: torch.Tensor, target: torch.Tensor) -> float:
    """The time of one step's forward and backward pass."""
    model.set_recompute(*plan)
    start = time.perf_counter()
    torch.nn.functional.cross_entropy(model(x), target).backward()
    model.zero_grad(set_to_none=True)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Prints a line for each depth and plan."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    device = choose_device("auto")
    setting = Setting(arguments.batch_size, "fp32", device.type)
    x = torch.randn(arguments.batch_size, 3, 224, 224, device=device)
    target = torch.zeros(arguments.batch_size, dtype=torch.long, device=device)
    print(describe())
    print("| layers | recompute | kept (MB/image) | step (s) | over no recomputation (quartiles) |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for layers in (20, 1000):
        spec = PRESETS["sret_t"].at(layers=layers)
        model = build_model(spec).to(device)
        names = ("none", "auto", "pass")
        plans = {name: predict(spec, setting, name)[1] for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for plan in (plans["auto"], fixed_plan(spec, "none")):
            seconds(model, plan, x, target)
        for _ in range(arguments.rounds):
            for name in names:
                times[name].append(seconds(model, plans[name], x, target))
        for name in names:
            kept = predict(spec, setting, name)[0].kept_bytes / arguments.batch_size / 1e6
            ratios = [a / b for a, b in zip(times[name], times["none"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            chosen = f"{name}, {'-'.join(map(str, plans[name].segments))}"
            line = f"| {layers:,} | {chosen} | {kept:.1f} | {statistics.median(times[name]):.2f} "
            print(line + f"| {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
