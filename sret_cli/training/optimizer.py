"""What moves the weights: timm's optimizers, schedules, mixing of images, and averaged weights."""

import random
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sret_cli.runtime.errors import SretError, nearest_choice
from sret_cli.spec.train import TrainSpec


def create_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """Timm's optimizer of that name, with weight decay on matrices alone.

    Raises:
        SretError: there is none, or it cannot work here.
    """
    if spec.opt not in list_optimizers():
        raise SretError(f"unknown opt {spec.opt!r}; {nearest_choice(spec.opt, list_optimizers())}")
    decay = spec.layer_decay if spec.layer_decay < 1 else None
    try:
        optimizer = create_optimizer_v2(
            model, spec.opt, spec.lr, spec.weight_decay, layer_decay=decay
        )
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or "it needs what is not here"
        raise SretError(f"opt = {spec.opt!r} cannot be used: {reason}; use adamw") from None
    if getattr(optimizer, "is_second_order", False):
        raise SretError(f"opt = {spec.opt!r} needs second derivatives; use adamw or another")
    return optimizer


def create_schedule(
    optimizer: torch.optim.Optimizer, spec: TrainSpec, steps_per_epoch: int
) -> Scheduler:
    """Timm's schedule of that name: `set_rate` has it set the learning rate of a step.

    Raises:
        SretError: its epochs do not fit into the training.
    """
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=spec.sched,
            num_epochs=spec.epochs,
            decay_epochs=spec.decay_epochs,
            decay_milestones=list(spec.decay_milestones),
            decay_rate=spec.decay_rate,
            min_lr=spec.min_lr,
            warmup_epochs=spec.warmup_epochs,
            warmup_lr=spec.lr / 100 if spec.warmup_lr is None else spec.warmup_lr,
            step_on_epochs=not spec.sched_on_updates,
            updates_per_epoch=steps_per_epoch,
        )
    except ValueError as error:
        raise SretError(f"sched = {spec.sched!r}: {error}; set train.decay_epochs") from None
    return schedule


def set_rate(schedule: Scheduler, step: int, steps_per_epoch: int) -> None:
    """Sets the learning rate of a step, which is a function of its number (from 0) alone."""
    schedule.step(step // steps_per_epoch)  # timm's schedules heed one of the two
    schedule.step_update(step)


def create_mixup(spec: TrainSpec, num_classes: int) -> Mixup | None:
    """Timm's mixup and cutmix, of whole batches; None where the spec has neither."""
    if not spec.mixup and not spec.cutmix:
        return None
    return Mixup(spec.mixup, spec.cutmix, label_smoothing=spec.smoothing, num_classes=num_classes)


def mix_batch(mixup: Mixup, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Images mixed in pairs, and their soft targets `[B, classes]`; an odd one out stays plain."""
    even = len(x) // 2 * 2
    if even == len(x):
        return mixup(x, target)
    last = mixup_target(target[even:], mixup.num_classes, smoothing=mixup.label_smoothing)
    if not even:
        return x, last
    mixed, soft = mixup(x[:even], target[:even])
    return torch.cat((mixed, x[even:])), torch.cat((soft, last))


def create_ema(model: nn.Module, spec: TrainSpec) -> Any:
    """Timm's average of the weights over the steps; None where the spec has none.

    It walks the state dict, which has each tensor once, however many passes or blocks share it.
    """
    if not spec.model_ema_decay:
        return None
    stored = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(stored) == len(set(stored)), "a shared tensor would be averaged twice"
    return ModelEmaV3(model, decay=spec.model_ema_decay, use_warmup=spec.model_ema_warmup)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seeds every generator for one training step, so that it can be done again by itself.

    torch's differ between the ranks, for dropout. Returns the number that the others start from,
    and those of the first rank.
    """
    number, own = (random.Random(f"{seed} {step} {r}").getrandbits(32) for r in (0, rank))
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(own)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(own)
    return number


def draw_recursions(spec: TrainSpec, step: int) -> int:
    """The recursion count of a training step: the same in every process."""
    assert spec.recursions_range is not None
    return random.Random(f"{spec.seed} {step}").randint(*spec.recursions_range)
