"""Predicts the memory of a training step and of inference, and plans recomputation to fit it.

Kernels' workspaces are not predicted, except cuBLAS's. The first step of CUDA's convolutions tries
several kernels and may take more.
"""

from typing import Any

import torch

from sret_cli.cost.footprint import Setting, read_parts, read_weights
from sret_cli.cost.plan import (
    Plan,
    Recompute,
    fixed_plan,
    least_memory_plan,
    least_time_plan,
    planned_peak,
)
from sret_cli.cost.step import Memory, walk_step
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.train import TrainSpec


def predict_memory(
    spec: ModelSpec, setting: Setting, recompute: Recompute = "none", budget: int | None = None
) -> tuple[Memory, Plan]:
    """The memory of a model on a device, and the plan of recomputation that it is predicted for.

    Assumes that gradients are freed after the optimizer's step, before the next forward pass.

    Args:
        spec: the model.
        setting: batch size, precision, device and optimizer.
        recompute: as in `TrainSpec`. "auto" takes the plan that needs least memory; with a budget,
            the plan that recomputes least of those that fit, if any fits.
        budget: bytes.
    """
    parts, weights = read_parts(spec, setting), read_weights(spec, setting.device)

    def memory_of(plan: Plan) -> Memory:
        return walk_step(parts=parts, weights=weights, setting=setting, spec=spec, plan=plan)

    if recompute != "auto":
        fixed = fixed_plan(spec, recompute)
        return memory_of(fixed), fixed
    least_plan = least_memory_plan(parts, weights)
    least = memory_of(least_plan)
    limit = max(budget or 0, least.training_memory_bytes)
    no_plan = fixed_plan(spec, "none")
    most = memory_of(no_plan)
    if most.training_memory_bytes <= limit:
        return most, no_plan
    rest = least.training_memory_bytes - planned_peak(parts, least_plan)
    for _ in range(4):  # the planned peak ignores the order of events, so the limit is lowered
        plan = least_time_plan(parts, weights, limit - rest)
        if plan is None:
            break
        memory = memory_of(plan)
        if memory.training_memory_bytes <= limit:
            return memory, plan
        rest += memory.training_memory_bytes - limit
    return least, least_plan


def set_recompute(
    model: Any,
    train: TrainSpec,
    device: torch.device,
    budget: int | None = None,
    world_size: int = 1,
) -> None:
    """Sets what a model recomputes in training; timm models recompute all passes or none."""
    if model.spec.is_timm:
        model.set_grad_checkpointing(train.recompute != "none")
        return
    spec = model.spec
    if train.recursions_range is not None and spec.order is None:
        spec = spec.with_values(recursions=train.recursions_range[1])
    if train.recompute == "auto":
        images = -(-train.batch_size // world_size)
        setting = Setting(images, train.precision, device.type, train.opt)
        plan = predict_memory(spec, setting, "auto", budget)[1]
        model.set_recompute(plan.segments, plan.recomputed)
    else:
        model.set_recompute(fixed_plan(spec, train.recompute).segments)


def largest_batch(spec: ModelSpec, setting: Setting, recompute: Recompute, budget: int) -> int:
    """The largest batch whose training step fits a budget in bytes; 0 where one image does not."""

    def needs(size: int) -> int:
        memory, _ = predict_memory(spec, setting._replace(batch_size=size), recompute)
        return memory.training_memory_bytes

    fits, fails = 0, 0
    size, needed = 1, needs(1)
    slope = max((needs(64) - needed) / 63, 1)
    while True:
        if needed <= budget:
            fits = size
        else:
            fails = size
        if fails and fails - fits == 1:
            return fits
        guess = max(size + int((budget - needed) // slope), fits + 1)
        size = min(guess, fails - 1) if fails else guess
        needed = needs(size)
