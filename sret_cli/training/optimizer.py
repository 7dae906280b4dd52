"""Optimizers, schedules, mixing of images and averaged weights, all by timm; seeds of a step."""

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

from sret_cli.runtime.errors import SretError, first_line, nearest_choice
from sret_cli.spec.train import TrainSpec


def create_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimizer that timm has under the name `spec.opt`, with weight decay on matrices only.

    Raises:
        SretError: timm has no such optimizer, or it cannot be used here.
    """
    if spec.opt not in list_optimizers():
        raise SretError(f"unknown opt {spec.opt!r}; {nearest_choice(spec.opt, list_optimizers())}")
    decay = spec.layer_decay if spec.layer_decay < 1 else None
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=spec.opt,
            lr=spec.lr,
            weight_decay=spec.weight_decay,
            layer_decay=decay,
        )
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        raise SretError(
            f"opt = {spec.opt!r} cannot be used: {first_line(error)}; use adamw"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise SretError(f"opt = {spec.opt!r} needs second derivatives; use adamw or another")
    return optimizer


def create_schedule(
    optimizer: torch.optim.Optimizer, spec: TrainSpec, steps_per_epoch: int
) -> Scheduler:
    """The schedule that timm has under the name `spec.sched`; `set_rate` applies it.

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
    """Sets the learning rate of a step, which depends only on its number (from 0)."""
    schedule.step(step // steps_per_epoch)  # a timm schedule uses one of the two
    schedule.step_update(step)


def create_mixup(spec: TrainSpec, num_classes: int) -> Mixup | None:
    """Mixup and cutmix as in timm, for complete batches; None if the spec has neither."""
    if not spec.mixup and not spec.cutmix:
        return None
    return Mixup(
        mixup_alpha=spec.mixup,
        cutmix_alpha=spec.cutmix,
        label_smoothing=spec.smoothing,
        num_classes=num_classes,
    )


def mix_batch(mixup: Mixup, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Images mixed in pairs, and their soft targets `[B, classes]`.

    The last image of an odd number is not mixed.
    """
    even = len(x) // 2 * 2
    if even == len(x):
        return mixup(x, target)
    last = mixup_target(target[even:], mixup.num_classes, smoothing=mixup.label_smoothing)
    if not even:
        return x, last
    mixed, soft = mixup(x[:even], target[:even])
    return torch.cat((mixed, x[even:])), torch.cat((soft, last))


def create_ema(model: nn.Module, spec: TrainSpec) -> Any:
    """The moving average of the weights, as in timm; None if the spec asks for none.

    timm averages the entries of the state dict. It has each tensor once, also where several passes
    or blocks use the tensor.
    """
    if not spec.model_ema_decay:
        return None
    stored = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(stored) == len(set(stored)), "a tied tensor would be averaged twice"
    return ModelEmaV3(model, decay=spec.model_ema_decay, use_warmup=spec.model_ema_warmup)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seeds every random generator for one training step, so that the step can be repeated.

    Returns the seed of Python's and NumPy's generators, and of torch's on the first rank. On other
    ranks torch has another seed, so that dropout differs between ranks.
    """
    number, own = (random.Random(f"{seed} {step} {r}").getrandbits(32) for r in (0, rank))
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(own)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(own)
    return number


def draw_recursions(spec: TrainSpec, step: int) -> int:
    """The number of recursions in a training step, the same in every process."""
    assert spec.recursions_range is not None
    return random.Random(f"{spec.seed} {step}").randint(*spec.recursions_range)
