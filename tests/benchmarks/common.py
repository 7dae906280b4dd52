"""What the benchmarks share: rounds side by side, ratios with their spread, and the reference."""

import argparse
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from sret_cli.model.linear import ONEDNN, product
from sret_cli.spec.model import ModelSpec

Call = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How often faster the second of two calls was, round by round, and both calls' medians."""

    median: float
    low: float
    high: float
    first_seconds: float
    second_seconds: float

    def __str__(self) -> str:
        return (
            f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}); "
            f"{1e3 * self.first_seconds:.4g} ms and {1e3 * self.second_seconds:.4g} ms"
        )


def arguments(description: str | None, *, reference: bool = False) -> argparse.ArgumentParser:
    """A parser with the flags that benchmarks share."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    if reference:
        parser.add_argument(
            "--reference", type=Path, required=True, help="a clone of github.com/szq0214/SReT"
        )
    return parser


def prepare(device: str) -> str:
    """Fixes threads and denormals, and returns what to print of the machine."""
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, 2 threads"
    return f"{name}; torch {torch.__version__}; {date.today()}"


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "CPU")


def seconds(call: Call, device: str = "cpu") -> float:
    """Wall time of one call, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def side_by_side(first: Call, second: Call, device: str, rounds: int = 10) -> Ratio:
    """Times two calls in alternating rounds, after two rounds of warm-up.

    The ratio is the median of the rounds' ratios, its spread their quartiles.
    """
    for _ in range(2):
        first(), second()
    pairs = [(seconds(first, device), seconds(second, device)) for _ in range(rounds)]
    low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return Ratio(
        median,
        low,
        high,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )


def reference_module(directory: Path) -> ModuleType:
    """The reference's model file, imported (it needs `pip install einops`)."""
    if not (directory / "SReT.py").exists():
        raise SystemExit(f"no SReT.py in {directory}; clone github.com/szq0214/SReT")
    sys.path.insert(0, str(directory))
    return importlib.import_module("SReT")


def peak_flops(device: str) -> float:
    """Operations a second (two a multiply-add) of large matrix products, the best of ten."""
    size = 8192 if device == "cuda" else 2048
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=kind)
    multiply = product if device == "cpu" and ONEDNN else torch.mm
    return 2 * size**3 / min(seconds(lambda: multiply(a, b), device) for _ in range(10))


def deep_reference(module: ModuleType, spec: ModelSpec) -> nn.Module:
    """The reference's network with a preset's widths and more recursions."""
    heads = spec.num_heads
    return module.SReT(
        image_size=spec.img_size,
        patch_size=16,
        stride=8,
        base_dims=[dim // head for dim, head in zip(spec.embed_dims, heads, strict=True)],
        depth=[spec.passes(stage) for stage in range(spec.stages)],
        recursive_num=list(spec.blocks),
        heads=list(heads),
        groups1=list(spec.slices),
        groups2=list(spec.recursive_slices),
        mlp_ratio=spec.mlp_ratio,
        np_mlp_ratio=spec.nll_ratio,
    )
