"""How a training treats its memory, what it shows of that, and what to say if it is too little."""

from sret_cli.cost.footprint import Setting
from sret_cli.cost.memory import largest_batch, predict_memory
from sret_cli.runtime.device import free_bytes, peak_gigabytes, used_bytes
from sret_cli.runtime.errors import RESOURCES, SretError
from sret_cli.training.trainer import Trainer


def describe_step(trainer: Trainer, loss: float, lr: float) -> str:
    """What is shown of a training after a step; the accuracy is that of the last evaluation."""
    p, top1 = trainer.progress, trainer.progress.results.get("top1_percent")
    accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
    return (
        f"epoch {p.epoch + 1}/{trainer.spec.epochs}{accuracy}, loss {loss:.3f}, lr {lr:.2g}, "
        f"{p.images / p.seconds:.0f} images/s, {peak_gigabytes(trainer.device)}"
    )


def out_of_memory_error(error: BaseException, trainer: Trainer) -> SretError:
    """The user's error, with what was in use and predicted, and what can be done about it."""
    spec, step = trainer.spec, trainer.progress.step + 1
    at_once = -(-spec.batch_size // (spec.accumulation * trainer.ranks.world_size))
    fits, predicted = 0, ""
    if not trainer.run.model.is_timm:
        setting = Setting(at_once, spec.precision, trainer.device.type, spec.opt)
        needed = predict_memory(trainer.run.model, setting, spec.recompute)[0].training_memory_bytes
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
