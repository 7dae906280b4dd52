"""What a model costs on a device: time of inference and of a training step, and peak memory."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sret_cli.cost.allocations import most_allocated
from sret_cli.cost.footprint import Setting
from sret_cli.cost.memory import largest_batch, predict_memory
from sret_cli.model.compile import GraphedInference, OnFailure, compile_model
from sret_cli.model.kinds import build_any, inference_copy
from sret_cli.runtime.device import autocast, device_name, free_bytes, synchronize
from sret_cli.runtime.errors import RESOURCES, SretError
from sret_cli.spec.backbone import Spec
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.run import Row


def measure_speed(
    spec: Spec,
    device: torch.device,
    batch_size: int,
    precision: str,
    compiles: str = "off",
    on_failure: OnFailure | None = None,
) -> Row:
    """Time and memory of inference and of a training step (forward, backward, AdamW) on a device.

    Inference runs the fused model (`SReT.fused`); compiled on CUDA, it is one graph of kernels.
    Times are medians of at least 5 rounds after 2 rounds of warm-up, with the interquartile range;
    they do not include compilation. `peak_memory_bytes` is the training step's: on CUDA the
    allocator's maximum, on a CPU the weights, the optimizer state and the most that torch allocated
    besides them.

    Args:
        spec: the model.
        device: the device to measure on.
        batch_size: images of a step.
        precision: fp32, or bf16 by autocast.
        compiles: off, on or auto, as in `compile_model`.
        on_failure: as in `compile_model`.

    Raises:
        SretError: the training step needs more memory than is free.
    """
    if not spec.is_timm:
        _check_memory(spec, device, batch_size, precision)
    model = build_any(spec).to(device)
    size = (batch_size, spec.in_chans, spec.img_size, spec.img_size)
    x = torch.randn(size, device=device)
    target = torch.randint(max(spec.num_classes, 1), (batch_size,), device=device)
    forward = inference_function(model, x, precision, compiles, on_failure)
    compile_model(model, compiles, on_failure)
    step, optimizer = training_step(model, x, target, precision)
    forward_seconds, forward_iqr = median_seconds(forward, device)
    del forward
    step_seconds, step_iqr = median_seconds(step, device)
    return {
        "measured_device": device.type,
        "measured_device_name": device_name(device),
        "measured_batch_size": batch_size,
        "measured_precision": precision,
        "measured_compile": compiles,
        "forward_seconds": forward_seconds,
        "forward_seconds_iqr": forward_iqr,
        "step_seconds": step_seconds,
        "step_seconds_iqr": step_iqr,
        "inference_images_per_second": batch_size / forward_seconds,
        "training_images_per_second": batch_size / step_seconds,
        "peak_memory_bytes": peak_memory_bytes(step, model, optimizer, device),
    }


def _check_memory(spec: ModelSpec, device: torch.device, batch_size: int, precision: str) -> None:
    """Refuses a training step that cannot fit, before the system kills the process."""
    setting, free = Setting(batch_size, precision, device.type), free_bytes(device)
    needed = predict_memory(spec, setting)[0].training_memory_bytes
    if needed > free:
        most = largest_batch(spec, setting, "none", free)
        advice = f"use --batch-size {most}, or fewer layers" if most else "use fewer layers"
        raise SretError(
            f"out of memory: a training step of {batch_size} images needs {needed / 1e9:.1f} GB, "
            f"{(needed - free) / 1e9:.1f} GB more than the {free / 1e9:.1f} GB that are free; "
            f"{advice}",
            RESOURCES,
        )


def inference_function(
    model: nn.Module, x: Tensor, precision: str, compiles: str, on_failure: OnFailure | None = None
) -> Callable[[], object]:
    """A function that runs images through a copy of the model made for inference."""
    copy = inference_copy(model)
    compile_model(copy, compiles, on_failure)
    if x.device.type == "cuda" and compiles != "off":
        return partial(GraphedInference(copy, x, precision), x)

    def forward() -> None:
        with torch.inference_mode(), autocast(x.device, precision):
            copy(x)

    return forward


def median_seconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median and interquartile range of a call's wall time: 5 to 50 rounds, about 2 seconds."""
    seconds: list[float] = []
    for _ in range(2):
        call()
    while len(seconds) < 5 or (sum(seconds) < 2 and len(seconds) < 50):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(seconds, n=4)
    return median, high - low


def training_step(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor, precision: str
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A function that trains a model for one step (forward, backward, AdamW), and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def step() -> None:
        with autocast(x.device, precision):
            output = model(x)
        nn.functional.cross_entropy(output.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def peak_memory_bytes(
    step: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
) -> int:
    """The most bytes that tensors take during a training step or inference.

    On a CPU these are the weights, the state of the optimizer if there is one, and the most that
    the call allocates.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    tensors = [*model.parameters(), *model.buffers()]
    states = () if optimizer is None else optimizer.state.values()
    tensors += [v for state in states for v in state.values() if torch.is_tensor(v)]
    held = sum(t.untyped_storage().nbytes() for t in tensors)
    return held + most_allocated(step)
