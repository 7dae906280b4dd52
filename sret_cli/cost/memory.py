"""What a training step and inference need in memory, known before either is run, and recomputation.

The passes of a schedule are walked forth and back in numbers alone, with what each takes
(`sret_cli.footprint`). A plan says which of them are recomputed, so that the whole fits or needs
least. Kernels' workspaces are not seen, but for cuBLAS's; the first step of CUDA's convolutions,
which tries kernels, may take more.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from sret_cli.cost.footprint import (
    FLOAT_BYTES,
    INDEX_BYTES,
    Parts,
    Setting,
    Weights,
    inference_peak,
    read_parts,
    read_weights,
)
from sret_cli.cost.liveness import Usage
from sret_cli.cost.plan import Plan, Recompute, _least_memory, _least_time, _need, fixed_plan
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.schedule import Pass
from sret_cli.spec.train import TrainSpec

# cuBLAS: ":4096:8" in CUBLAS_WORKSPACE_CONFIG, which training sets, and the default on Hopper.
WORKSPACE_BYTES = {"cpu": 0, "cuda": 32 * 2**20}
STATE_BYTES = {"cpu": torch.get_rng_state().nbytes, "cuda": 0}  # of the random generator
# Numbers that optimizers keep for each parameter, in fp32.
STATES = {"adamw": 2, "adam": 2, "nadam": 2, "nadamw": 2, "radam": 2, "lamb": 2, "adabelief": 2}
STATES |= {"sgd": 1, "momentum": 1, "lion": 1, "rmsprop": 2}

Bytes = dict[tuple, int]  # of what belongs to a module


@dataclass(frozen=True)
class Memory:
    """What a training step has at its peak, in bytes, and the peak of inference.

    Inference is the model's as `sret eval` runs it; its fused copy, which `profile` times, needs
    less.

    `kept_bytes` are kept for the backward pass, with the segment under recomputation;
    `transient_bytes` are all else at the peak: the batch, temporaries and workspaces.
    `saved_bytes` are kept when the forward pass ends.
    """

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kept_bytes: int
    transient_bytes: int
    training_memory_bytes: int
    inference_memory_bytes: int
    saved_bytes: int

    def row(self) -> dict[str, int]:
        """The measurements of a row."""
        return asdict(self)


def predict_memory(
    spec: ModelSpec, setting: Setting, recompute: Recompute = "none", budget: int | None = None
) -> tuple[Memory, Plan]:
    """The memory of a model on a device, and the recomputation that comes with it.

    Gradients are taken to be freed after the optimizer's step, before the next forward pass.

    Args:
        spec: the model.
        setting: batch, precision, device and optimizer.
        recompute: as in `TrainSpec`. "auto" takes what needs least memory or, given a budget, what
            recomputes least of all that fits; where nothing fits, what needs least memory.
        budget: bytes.
    """
    parts, weights = read_parts(spec, setting), read_weights(spec, setting.device)
    if recompute != "auto":
        plan = fixed_plan(spec, recompute)
        return _walk(parts, weights, setting, spec, plan), plan
    plan = _least_memory(parts, weights)
    memory = _walk(parts, weights, setting, spec, plan)
    limit = max(budget or 0, memory.training_memory_bytes)
    over = _walk(parts, weights, setting, spec, fixed_plan(spec, "none"))
    if over.training_memory_bytes <= limit:
        return over, fixed_plan(spec, "none")
    rest = memory.training_memory_bytes - _need(parts, plan)
    for _ in range(4):  # `_need` leaves out what depends on the order of events: ask for less
        other = _least_time(parts, weights, limit - rest)
        if other is None:
            break
        found = _walk(parts, weights, setting, spec, other)
        if found.training_memory_bytes <= limit:
            return found, other
        rest += found.training_memory_bytes - limit
    return memory, plan


def set_recompute(
    model: Any,
    train: TrainSpec,
    device: torch.device,
    budget: int | None = None,
    world_size: int = 1,
) -> None:
    """Has a model recompute what its training asks for; timm's models know all passes or none."""
    if model.spec.is_timm:
        model.set_grad_checkpointing(train.recompute != "none")
        return
    spec = model.spec
    if train.recursions_range is not None and spec.order is None:
        spec = spec.with_values(recursions=train.recursions_range[1])
    if train.recompute == "auto":
        images = -(-train.batch_size // world_size)
        setting = Setting(images, train.precision, device.type, train.opt)
        model.set_recompute(*predict_memory(spec, setting, "auto", budget)[1])
    else:
        model.set_recompute(fixed_plan(spec, train.recompute).segments)


def largest_batch(spec: ModelSpec, setting: Setting, recompute: Recompute, budget: int) -> int:
    """The most images whose training step fits a budget in bytes; 0 where one image does not."""

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


class _Walk:
    """A training step in numbers: what is alive, and the most that ever was."""

    def __init__(self, fixed: int) -> None:
        self.fixed = fixed  # weights, optimizer state, batch
        self.kept = self.gradients = 0
        self.peak = self.kept_then = self.gradients_then = 0
        self.have_gradients: set[tuple] = set()
        self.copies: Bytes = {}  # of weights, in bf16: until the forward pass is over,
        self.needed: Bytes = {}  # or the backward pass

    def note(self, more: int) -> None:
        """Something more is alive for a moment."""
        alive = self.fixed + self.kept + self.gradients + more
        if alive > self.peak:
            self.peak, self.kept_then, self.gradients_then = alive, self.kept, self.gradients

    def forward(self, usage: Usage, copies: "_Copies", keeps: bool = True) -> None:
        """Goes through a part; what comes in is counted with it."""
        self.kept += sum(size for key, size in copies.made.items() if key not in self.copies)
        self.copies |= copies.made
        if keeps:
            self.needed |= copies.kept
        self.note(usage.forward_peak if keeps else usage.inference_peak)
        self.kept += usage.kept if keeps else 0

    def end_forward(self) -> int:
        """Drops the copies of weights that autograd did not keep; returns what is kept."""
        self.kept += sum(self.needed.values()) - sum(self.copies.values())
        return self.kept

    def backward(self, usage: Usage, gradients: Bytes) -> None:
        """Goes back through a part; its weights get gradients, or have some already."""
        new = {key: size for key, size in gradients.items() if key not in self.have_gradients}
        self.gradients += sum(new.values())
        self.have_gradients |= new.keys()
        again = usage.weight_gradient if len(new) < len(gradients) else 0
        self.note(usage.backward_peak - usage.kept + again)
        self.kept -= usage.kept

    def recompute(self, usages: list[Usage], copies: Bytes) -> None:
        """Goes through a segment again; what entered it is there already."""
        self.kept += sum(copies.values()) - usages[0].kept_input
        for usage in usages:
            self.note(usage.forward_peak + usages[-1].output)
            self.kept += usage.kept


def _walk(parts: Parts, weights: Weights, setting: Setting, spec: ModelSpec, plan: Plan) -> Memory:
    """The memory of a training step with a plan of recomputation, and that of inference."""
    there = weights.parameters + weights.buffers
    states = STATES.get(setting.opt, 2) * weights.parameters
    image = FLOAT_BYTES * spec.in_chans * spec.img_size**2
    around = setting.batch_size * (image + INDEX_BYTES) + WORKSPACE_BYTES[setting.device]
    step = _Walk(there + states + around)
    rest = {("rest",): weights.rest}

    # Recomputation keeps the state of the generator to draw the same random numbers again.
    state = STATE_BYTES[setting.device] if spec.drop_rate or spec.attn_drop_rate else 0

    step.forward(parts.stem, _copies(parts.stem, "stem"))
    for s, stage in enumerate(parts.stages):
        if stage.pool:
            step.forward(stage.pool, _copies(stage.pool, "pool", s - 1))
        step.kept += stage.drawn
        segment, first = _recomputed(plan, s)
        for i, usage in enumerate(stage.usages):
            step.forward(usage, _copies_of_pass(usage, s, stage.schedule[i]), i >= first)
            if i < first and i % segment == 0:
                step.kept += usage.input + state
    step.forward(parts.head, _copies(parts.head, "head"))
    saved = step.end_forward()
    step.backward(parts.head, rest)
    for s, stage in reversed(list(enumerate(parts.stages))):
        segment, first = _recomputed(plan, s)
        usages = stage.usages
        gradients = [_of_pass(s, p, weights.blocks[s], weights.nlls[s]) for p in stage.schedule]
        for i in range(len(usages) - 1, first - 1, -1):
            step.backward(usages[i], gradients[i])
        step.kept -= sum(size for key, size in step.needed.items() if key[-1] == s)
        for start in reversed(range(0, first, segment or 1)):
            numbers = range(start, min(start + segment, first))
            copies: Bytes = {}
            for i in numbers:
                copies |= _copies_of_pass(usages[i], s, stage.schedule[i]).made
            step.recompute([usages[i] for i in numbers], copies)
            for i in reversed(numbers):
                step.backward(usages[i], gradients[i])
            step.kept -= sum(copies.values()) + usages[start].input - usages[start].kept_input
            step.kept -= state
        step.kept -= stage.drawn
        if stage.pool:
            step.backward(stage.pool, rest)
    step.backward(parts.stem, rest)
    step.kept, step.gradients = 0, weights.parameters
    step.note(weights.parameters if setting.device == "cuda" else 2 * weights.largest)
    return Memory(
        weight_bytes=there,
        gradient_bytes=step.gradients_then,
        optimizer_bytes=states,
        kept_bytes=step.kept_then,
        transient_bytes=step.peak - there - states - step.kept_then - step.gradients_then,
        training_memory_bytes=step.peak,
        inference_memory_bytes=there + around + inference_peak(parts),
        saved_bytes=saved,
    )


def _recomputed(plan: Plan, stage: int) -> tuple[int, int]:
    """The passes of a segment, and the first pass that is not recomputed."""
    segment = plan.segments[stage]
    return segment, plan.recomputed[stage] if segment else 0


class _Copies(NamedTuple):
    """Copies of weights in bf16: by block, NLL or other module, all of them and those kept."""

    made: Bytes
    kept: Bytes


@cache
def _split(casts: tuple[tuple[str, int, int], ...]) -> tuple[int, int, int, int]:
    """Bytes of the copies of a block's (or another module's) weights, those kept, and the NLL's."""
    sums = [0, 0, 0, 0]
    for name, size, kept in casts:
        is_nll = ".nlls." in name
        sums[2 * is_nll] += size
        sums[2 * is_nll + 1] += kept
    return sums[0], sums[1], sums[2], sums[3]


def _copies(usage: Usage, *module: object) -> _Copies:
    made, kept, _, _ = _split(usage.casts)
    return _Copies({module: made}, {module: kept})


def _copies_of_pass(usage: Usage, s: int, p: Pass) -> _Copies:
    block, block_kept, nll, nll_kept = _split(usage.casts)
    return _Copies(_of_pass(s, p, block, nll), _of_pass(s, p, block_kept, nll_kept))


def _of_pass(s: int, p: Pass, block: int, nll: int) -> Bytes:
    """Bytes that belong to a pass's block and to its NLL."""
    return {("block", p.block, s): block} | ({} if p.nll is None else {("nll", p.nll, s): nll})
