"""How a training treats its memory, what it shows of that, and what to say if it is too little."""

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sret_cli.errors import RESOURCES, SretError
from sret_cli.measure import free_bytes
from sret_cli.memory import Setting, largest_batch, predict
from sret_cli.spec import ModelSpec
from sret_cli.trainer import Trainer


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Has Python look for garbage in what is new, and rarely in all that is there.

    A full collection walks through every pass of the graph: at 10,000 layers it would take a third
    of a step. Tensors do not wait for it, since they are in no cycles.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(before[0], before[1], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def used_bytes(device: torch.device) -> int:
    """What this process has of a device's memory now; on a CPU it is not told apart."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def peak_gigabytes(device: torch.device) -> str:
    """The most memory that was in use so far: CUDA's allocator's, or this process's."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{used / 1e9:.1f} GB"


def describe_step(trainer: Trainer, loss: float, lr: float) -> str:
    """What is shown of a training after a step; the accuracy is that of the last evaluation."""
    p, top1 = trainer.progress, trainer.progress.results.get("top1_percent")
    accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
    return (
        f"epoch {p.epoch + 1}/{trainer.spec.epochs}{accuracy}, loss {loss:.3f}, lr {lr:.2g}, "
        f"{p.images / p.seconds:.0f} images/s, {peak_gigabytes(trainer.device)}"
    )


def not_enough(error: BaseException, trainer: Trainer) -> SretError:
    """The user's error, with what was in use and predicted, and what can be done about it."""
    spec, step = trainer.spec, trainer.progress.step + 1
    at_once = -(-spec.batch_size // (spec.accumulation * trainer.ranks.world_size))
    fits, predicted = 0, ""
    if isinstance(trainer.run.model, ModelSpec):
        setting = Setting(at_once, spec.precision, trainer.device.type, spec.opt)
        needed = predict(trainer.run.model, setting, spec.recompute)[0].training_memory_bytes
        predicted = f", {needed / 1e9:.1f} GB predicted"
        room = free_bytes(trainer.device) + used_bytes(trainer.device)
        fits = largest_batch(trainer.run.model, setting, spec.recompute, room)
    advice = "use a smaller model or fewer layers"
    if at_once > 1:
        share, most = spec.batch_size // trainer.ranks.world_size, fits or at_once
        parts = range(spec.accumulation + 1, share + 1)
        fewer = next(n for n in parts if share % n == 0 and share // n <= most)
        advice = f"use train.accumulation = {fewer}, or a smaller batch_size"
        if 0 < fits < at_once:
            advice += f" ({fits:,} images fit at a time)"
    reason = str(error).partition("\n")[0] or "the allocator gave up"
    return SretError(
        f"out of memory at step {step} with {at_once:,} images at a time: "
        f"{peak_gigabytes(trainer.device)} in use at the most{predicted} ({reason}); {advice}",
        RESOURCES,
        status="out_of_memory",
    )
