"""The memory of one training step, from walking its passes forward and backward in numbers.

Nothing is run: each pass adds and removes the bytes that its part takes (`cost.footprint`).
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import torch

from sret_cli.cost.count import FLOAT_BYTES, INDEX_BYTES
from sret_cli.cost.footprint import Parts, Setting, StageParts, Weights, inference_peak
from sret_cli.cost.liveness import Usage
from sret_cli.cost.plan import Plan
from sret_cli.spec.model import ModelSpec, Pass

# cuBLAS: ":4096:8" in CUBLAS_WORKSPACE_CONFIG, which training sets, and the default on Hopper.
WORKSPACE_BYTES = {"cpu": 0, "cuda": 32 * 2**20}
# State of the random generator, which a recomputed segment keeps to repeat its random draws.
STATE_BYTES = {"cpu": torch.get_rng_state().nbytes, "cuda": 0}
# Numbers that optimizers keep for each parameter, in fp32.
STATES = {"adamw": 2, "adam": 2, "nadam": 2, "nadamw": 2, "radam": 2, "lamb": 2, "adabelief": 2}
STATES |= {"sgd": 1, "momentum": 1, "lion": 1, "rmsprop": 2}

Bytes = dict[tuple, int]  # by block, NLL or other module; the last item of a key is the stage


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step at its peak, and the peak of inference.

    Inference is predicted for the model as `sret eval` runs it; the fused copy that `sret profile`
    times needs less.

    Attributes:
        weight_bytes: parameters and buffers.
        gradient_bytes: gradients at the peak.
        optimizer_bytes: state of the optimizer.
        kept_bytes: kept for the backward pass at the peak, with the segment that is recomputed.
        transient_bytes: all else at the peak: the batch, temporaries and workspaces.
        training_memory_bytes: the peak, which is the sum of the fields above.
        inference_memory_bytes: peak of inference.
        saved_bytes: kept for the backward pass when the forward pass ends.
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


def walk_step(
    parts: Parts, weights: Weights, setting: Setting, spec: ModelSpec, plan: Plan
) -> Memory:
    """The memory of a training step with a plan of recomputation, and that of inference."""
    weight_bytes = weights.parameters + weights.buffers
    optimizer_bytes = STATES.get(setting.opt, 2) * weights.parameters
    image = FLOAT_BYTES * spec.in_chans * spec.img_size**2
    batch = setting.batch_size * (image + INDEX_BYTES) + WORKSPACE_BYTES[setting.device]
    state = STATE_BYTES[setting.device] if spec.drop_rate or spec.attn_drop_rate else 0
    step = _Step(weight_bytes + optimizer_bytes + batch)
    _walk_forward(step, parts, plan, state)
    saved_bytes = step.end_forward()
    _walk_backward(step, parts, weights, plan, state)
    step.kept, step.gradients = 0, weights.parameters
    step.note(weights.parameters if setting.device == "cuda" else 2 * weights.largest)
    held = weight_bytes + optimizer_bytes + step.kept_at_peak + step.gradients_at_peak
    return Memory(
        weight_bytes=weight_bytes,
        gradient_bytes=step.gradients_at_peak,
        optimizer_bytes=optimizer_bytes,
        kept_bytes=step.kept_at_peak,
        transient_bytes=step.peak - held,
        training_memory_bytes=step.peak,
        inference_memory_bytes=weight_bytes + batch + inference_peak(parts),
        saved_bytes=saved_bytes,
    )


def _walk_forward(step: "_Step", parts: Parts, plan: Plan, state: int) -> None:
    """Goes forward through the network; `state` are bytes of the generator that a segment keeps."""
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


def _walk_backward(step: "_Step", parts: Parts, weights: Weights, plan: Plan, state: int) -> None:
    """Goes backward through the network, and recomputes the segments of the plan."""
    rest = {("rest",): weights.rest}
    step.backward(parts.head, rest)
    for s, stage in reversed(list(enumerate(parts.stages))):
        segment, first = _recomputed(plan, s)
        gradients = [_of_pass(s, p, weights.blocks[s], weights.nlls[s]) for p in stage.schedule]
        for i in range(len(stage.usages) - 1, first - 1, -1):
            step.backward(stage.usages[i], gradients[i])
        step.kept -= sum(size for key, size in step.needed.items() if key[-1] == s)
        for start in reversed(range(0, first, segment or 1)):
            numbers = range(start, min(start + segment, first))
            _walk_segment(step, stage, s, numbers, gradients)
            step.kept -= state
        step.kept -= stage.drawn
        if stage.pool:
            step.backward(stage.pool, rest)
    step.backward(parts.stem, rest)


def _walk_segment(
    step: "_Step", stage: StageParts, s: int, numbers: range, gradients: list[Bytes]
) -> None:
    """Recomputes a segment of a stage's passes, and goes backward through it."""
    copies: Bytes = {}
    for i in numbers:
        copies |= _copies_of_pass(stage.usages[i], s, stage.schedule[i]).made
    step.recompute([stage.usages[i] for i in numbers], copies)
    for i in reversed(numbers):
        step.backward(stage.usages[i], gradients[i])
    entered = stage.usages[numbers.start]
    step.kept -= sum(copies.values()) + entered.input - entered.kept_input


class _Step:
    """Bytes that are alive in a training step, and the most that were alive at once."""

    def __init__(self, fixed: int) -> None:
        self.fixed = fixed  # weights, optimizer state, batch
        self.kept = self.gradients = 0
        self.peak = self.kept_at_peak = self.gradients_at_peak = 0
        self.have_gradients: set[tuple] = set()
        self.copies: Bytes = {}  # copies of weights in bf16, alive until the forward pass ends
        self.needed: Bytes = {}  # those of them that the backward pass needs

    def note(self, more: int) -> None:
        """Notes a moment in which more bytes are alive."""
        alive = self.fixed + self.kept + self.gradients + more
        if alive > self.peak:
            self.peak = alive
            self.kept_at_peak, self.gradients_at_peak = self.kept, self.gradients

    def forward(self, usage: Usage, copies: "_Copies", keeps: bool = True) -> None:
        """Goes forward through a part, whose usage includes its input."""
        self.kept += sum(size for key, size in copies.made.items() if key not in self.copies)
        self.copies |= copies.made
        if keeps:
            self.needed |= copies.kept
        self.note(usage.forward_peak if keeps else usage.inference_peak)
        self.kept += usage.kept if keeps else 0

    def end_forward(self) -> int:
        """Drops the copies of weights that autograd did not keep; returns the bytes kept."""
        self.kept += sum(self.needed.values()) - sum(self.copies.values())
        return self.kept

    def backward(self, usage: Usage, gradients: Bytes) -> None:
        """Goes backward through a part; gradients are added to those that exist."""
        new = {key: size for key, size in gradients.items() if key not in self.have_gradients}
        self.gradients += sum(new.values())
        self.have_gradients |= new.keys()
        to_add = usage.weight_gradient if len(new) < len(gradients) else 0
        self.note(usage.backward_peak - usage.kept + to_add)
        self.kept -= usage.kept

    def recompute(self, usages: list[Usage], copies: Bytes) -> None:
        """Goes forward through a segment again; its input was kept."""
        self.kept += sum(copies.values()) - usages[0].kept_input
        for usage in usages:
            self.note(usage.forward_peak + usages[-1].output)
            self.kept += usage.kept


def _recomputed(plan: Plan, stage: int) -> tuple[int, int]:
    """A segment's number of passes, and the index of the first pass that is not recomputed."""
    segment = plan.segments[stage]
    return segment, plan.recomputed[stage] if segment else 0


class _Copies(NamedTuple):
    """Bytes of copies of weights in bf16: all of them, and those kept for the backward pass."""

    made: Bytes
    kept: Bytes


@cache
def _split(casts: tuple[tuple[str, int, int], ...]) -> tuple[int, int, int, int]:
    """Bytes of a pass's copies of weights: its block's, its NLL's; of each, all and those kept."""
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
    """Bytes of a pass's block and of its NLL, by module."""
    return {("block", p.block, s): block} | ({} if p.nll is None else {("nll", p.nll, s): nll})
