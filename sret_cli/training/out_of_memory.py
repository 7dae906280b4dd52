"""The error of a training that runs out of memory, with advice that follows from predictions."""

from collections.abc import Iterator
from contextlib import contextmanager

from sret_cli.cost.footprint import Setting
from sret_cli.cost.memory import largest_batch, predict_memory
from sret_cli.runtime.device import free_bytes, peak_gigabytes, used_bytes
from sret_cli.runtime.errors import RESOURCES, SretError, as_out_of_memory, first_line
from sret_cli.training.trainer import Trainer


@contextmanager
def explained_out_of_memory(trainer: Trainer) -> Iterator[None]:
    """Raises `out_of_memory_error` where torch or Python runs out of memory within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if as_out_of_memory(error) is None or trainer.ranks.is_lost_rank(error):
            raise
        raise out_of_memory_error(error, trainer) from None


def out_of_memory_error(error: BaseException, trainer: Trainer) -> SretError:
    """The error for the user: the memory in use, the memory predicted, and what to change."""
    spec, step = trainer.spec, trainer.progress.step + 1
    at_once = -(-spec.batch_size // (spec.accumulation * trainer.ranks.world_size))
    fits, predicted = 0, ""
    if not trainer.run.model.is_timm:
        setting = Setting(
            batch_size=at_once,
            precision=spec.precision,
            device=trainer.device.type,
            opt=spec.opt,
        )
        needed = predict_memory(trainer.run.model, setting, spec.recompute)[0].training_memory_bytes
        predicted = f", {needed / 1e9:.1f} GB predicted"
        room = free_bytes(trainer.device) + used_bytes(trainer.device)
        fits = largest_batch(
            trainer.run.model,
            setting,
            recompute=spec.recompute,
            budget=room,
        )
    advice = "use a smaller model or fewer layers"
    if at_once > 1:
        of_rank, most = spec.batch_size // trainer.ranks.world_size, fits or at_once
        parts = range(spec.accumulation + 1, of_rank + 1)
        accumulation = next(n for n in parts if of_rank % n == 0 and of_rank // n <= most)
        advice = f"use train.accumulation = {accumulation}, or a smaller batch_size"
        if 0 < fits < at_once:
            advice += f" ({fits:,} images fit at a time)"
    return SretError(
        f"out of memory at step {step} with {at_once:,} images at a time: "
        f"{peak_gigabytes(trainer.device)} in use at most{predicted} ({first_line(error)}); "
        f"{advice}",
        RESOURCES,
        status="out_of_memory",
    )
