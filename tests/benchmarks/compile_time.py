"""How long compilation takes at 1,000 layers, over 20, and whether steps compile anything again.

    python tests/benchmarks/compile_time.py [--train]

Each depth compiles in a fresh process without a cache, alternately. Compile time is the time of the
first call less that of a later one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from common import arguments, prepare

from sret_cli.model.compile import compile_model
from sret_cli.model.sret import build_model
from sret_cli.spec.presets import PRESETS

LAYERS = (20, 1000)


def compile_once(layers: int, device: str, trains: bool) -> dict[str, float]:
    """Cold compile seconds, and how many graphs three further steps added."""
    prepare(device)
    spec = PRESETS["sret_t"].with_values(nll="per_block").at(layers=layers)
    model = build_model(spec).to(device).train(trains)
    compile_model(model)
    x = torch.randn(2, 3, 224, 224, device=device)

    def step() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(trains):
            output = model(x)
        if trains:
            output.sum().backward()
            model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    later = [step() for _ in range(3)]
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    return {"seconds": first - statistics.median(later), "graphs": graphs, "again": again}


def main() -> None:
    """Prints compile times, their ratio, and recompilations."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(compile_once(given.once, given.device, given.train)))
        return
    print(prepare(given.device))
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, __file__, "--device", given.device] + ["--train"] * given.train
    ratios = []
    for _ in range(given.rounds):
        found = []
        for layers in LAYERS:
            done = subprocess.run(
                [*command, "--once", str(layers)], env=environment, capture_output=True, text=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{layers:5,} layers: {found[-1]['seconds']:.1f} s for {found[-1]['graphs']} "
                f"graphs; {found[-1]['again']} more in three further steps"
            )
        ratios.append(found[1]["seconds"] / found[0]["seconds"])
    median = statistics.median(ratios)
    print(f"1,000 layers over 20: {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
