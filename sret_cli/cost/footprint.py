"""What the parts of a network take in memory at a batch size: stem, passes, pools and head.

Each distinct part is traced once, forward and backward, on shapes without data. A trace does not
see what kernels allocate inside (oneDNN's copies of weights in another layout, buffers of each
thread). That depends on the processor and matters only for small models, so small parts are run
where the device is a CPU.
"""

from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sret_cli.cost.allocations import most_allocated
from sret_cli.cost.count import FLOAT_BYTES, INDEX_BYTES
from sret_cli.cost.liveness import ALIGNMENT, Trace, Usage, align_up, trace_storages
from sret_cli.cost.storages import Call, fake_module
from sret_cli.model.sret import SReT
from sret_cli.model.stage import Stage, one_pass
from sret_cli.runtime.device import autocast
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.passes import Pass, ends_shuffled

RUN_BYTES = 16 * 2**20  # on a CPU, parts of at most this size are run: milliseconds each


class Setting(NamedTuple):
    """How a step is run: all that its memory depends on besides the model."""

    batch_size: int
    precision: str = "fp32"
    device: str = "cuda"
    opt: str = "adamw"


class Weights(NamedTuple):
    """Bytes of parameters and buffers as allocated, and the work of passes.

    Attributes:
        blocks: for each stage, bytes of one block.
        nlls: for each stage, bytes of one NLL; 0 where it has none.
        rest: bytes of stem, position embeddings, pools, norm and head.
        parameters: bytes of all parameters.
        buffers: bytes of all buffers.
        largest: bytes of the largest parameter.
        macs: for each stage, multiply-adds of one pass, without attention's products.
    """

    blocks: tuple[int, ...]
    nlls: tuple[int, ...]
    rest: int
    parameters: int
    buffers: int
    largest: int
    macs: tuple[int, ...]


class StageParts(NamedTuple):
    """A stage at one batch size: its passes, what each takes, and the pool before them.

    `drawn` are the bytes that are drawn at random before the first pass: gathers and drop path.
    """

    schedule: tuple[Pass, ...]
    usages: tuple[Usage, ...]
    pool: Usage | None
    drawn: int


class Parts(NamedTuple):
    """The complete network at one batch size."""

    stem: Usage
    stages: tuple[StageParts, ...]
    head: Usage


class _Shapes(SReT):
    """The network without values; initialisation would read them, and fake tensors have none."""

    def _initialise(self) -> None:
        for stage in self.every_stage():  # gathers are made on the CPU
            stage.gathers_RN = torch.empty_like(stage.gathers_RN, device=self.pos_embed.device)


# Traces of parts in training and in inference, and measured peaks of parts on the CPU, by key.
_traced: dict[tuple, tuple[Trace, Trace]] = {}
_measured: dict[tuple, int] = {}


class _Tracer:
    """Traces the parts of a small network that were not traced before, and collects their calls."""

    def __init__(self, small: ModelSpec, setting: Setting, stack: ExitStack) -> None:
        self.small, self.setting, self.stack = small, setting, stack
        self.calls: dict[tuple, Call] = {}
        self._model: SReT | None = None

    def trace(self, name: tuple, call: Call) -> tuple[tuple, torch.dtype]:
        """The key of a part, and the type of its output."""
        key = (self.small, self.setting.device, self.setting.precision, name, call.dtype)
        self.calls[key] = call
        if key not in _traced:
            if self._model is None:
                self.stack.enter_context(fake_module(self.setting.device))
                self._model = _Shapes(self.small)
            training, inference = (
                trace_storages(
                    module=self._model,
                    call=call,
                    device=self.setting.device,
                    precision=self.setting.precision,
                    trains=trains,
                )
                for trains in (True, False)
            )
            _traced[key] = (training, inference)
        return key, _traced[key][0].output_dtype


class _StageKeys(NamedTuple):
    """The keys of a stage's passes, and of the pool before it; None before the first stage."""

    schedule: tuple[Pass, ...]
    passes: list[tuple]
    pool: tuple | None


def read_parts(spec: ModelSpec, setting: Setting) -> Parts:
    """What the parts of a network take; each distinct part is traced once in a process."""
    small = _small(spec)
    image = (spec.in_chans, spec.img_size, spec.img_size)
    stages: list[_StageKeys] = []
    with ExitStack() as stack:
        tracer = _Tracer(small, setting, stack)
        stem, dtype = tracer.trace(("stem",), Call(_embed, image, torch.float32, is_image=True))
        for s in range(spec.stages):
            keys, dtype = _trace_stage(tracer, spec, s, dtype)
            stages.append(keys)
        last = (spec.tokens[-1], spec.embed_dims[-1])
        head, _ = tracer.trace(("head",), Call(_run_head, last, dtype, has_loss=True))
    usages = _usages(small, setting, tracer.calls)
    stage_parts = [
        StageParts(
            schedule=keys.schedule,
            usages=tuple(usages[key] for key in keys.passes),
            pool=None if keys.pool is None else usages[keys.pool],
            drawn=_drawn_bytes(spec, s, setting.batch_size),
        )
        for s, keys in enumerate(stages)
    ]
    return Parts(usages[stem], tuple(stage_parts), usages[head])


def _trace_stage(
    tracer: _Tracer, spec: ModelSpec, s: int, dtype: torch.dtype
) -> tuple[_StageKeys, torch.dtype]:
    """The keys of a stage's parts, and the type of its output."""
    pool = None
    if s:
        before = (spec.tokens[s - 1], spec.embed_dims[s - 1])
        pool, dtype = tracer.trace(("pool", s), Call(_run_pool(s), before, dtype))
    keys, shape = [], (spec.tokens[s], spec.embed_dims[s])
    schedule, drops = spec.schedule(s), any(spec.drop_path_rates(s))
    for p in schedule:
        name = (s, p.slices, p.gathers, drops)
        key, dtype = tracer.trace(name, Call(_run_pass(s, p, drops), shape, dtype))
        keys.append(key)
    return _StageKeys(schedule, keys, pool), dtype


def _drawn_bytes(spec: ModelSpec, s: int, batch_size: int) -> int:
    """Bytes that a stage draws at random before its first pass: drop path and gathers."""
    schedule, drops = spec.schedule(s), any(spec.drop_path_rates(s))
    drawn = 2 * FLOAT_BYTES * batch_size * len(schedule) if drops else 0
    if spec.shuffle == "random":
        drawn += INDEX_BYTES * spec.tokens[s] * _gathers(schedule)
    return drawn


def _usages(small: ModelSpec, setting: Setting, calls: dict[tuple, Call]) -> dict[tuple, Usage]:
    """What each part takes; on a CPU, small parts are run to include what kernels allocate."""
    size, model, usages = setting.batch_size, None, {}
    for key, call in calls.items():
        training, inference = _traced[key]
        peak = inference.peak_at(size)
        if setting.device == "cpu" and peak <= RUN_BYTES:
            if (key, size) not in _measured:
                if model is None:
                    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                        model = SReT(small).eval()
                _measured[key, size] = _measure_peak(model, call, setting)
            peak = max(peak, _measured[key, size])
        usages[key] = training.at(size)._replace(inference_peak=peak)
    return usages


def _measure_peak(model: SReT, call: Call, setting: Setting) -> int:
    """The most bytes that a part holds when it is run on the CPU, including its input."""
    x = torch.zeros(setting.batch_size, *call.shape, dtype=call.dtype)
    ones_2B11 = torch.ones(2, setting.batch_size, 1, 1)

    def forward() -> None:
        with torch.inference_mode(), autocast(torch.device("cpu"), setting.precision):
            call.forward(model, x, ones_2B11)

    forward()  # the first call chooses kernels, which allocates more
    return most_allocated(forward) + (0 if call.is_image else x.nbytes)


def inference_peak(parts: Parts) -> int:
    """The most bytes that a forward pass without a graph holds, besides weights and the batch.

    Until a stage returns, its caller holds its input and the map that its pool read.
    """
    peak, before = parts.stem.inference_peak, 0
    for stage in parts.stages:
        if stage.pool:
            peak = max(peak, stage.pool.inference_peak)
        for index, usage in enumerate(stage.usages):
            held = before + (stage.usages[0].input if index else 0)
            peak = max(peak, held + usage.inference_peak)
        before = stage.usages[-1].output
    return max(peak, parts.head.inference_peak)


def _run_pass(stage: int, p: Pass, drops: bool) -> Any:
    """A function that runs a stage's first block with the slices and gather of a pass.

    The order and the drop path are drawn before the pass, so they are arguments of it.
    """

    def forward(model: Any, x_BNC: Tensor, ones_2B11: Tensor) -> Tensor:
        module: Stage = model.stages[stage]
        order_N = module.gathers_RN[0] if p.gathers else None
        lrc_4 = None if module.lrc_P4 is None else module.lrc_P4[0]
        block, nll = module.blocks[0], module.nlls[0] if len(module.nlls) else None
        drop_2B11 = ones_2B11 if drops else None
        return one_pass(block, nll, p.slices, x_BNC, order_N, drop_2B11, lrc_4)

    return forward


def _embed(model: Any, x_BCYX: Tensor, _: Tensor) -> Tensor:
    return model._embed(x_BCYX)


def _run_head(model: Any, x_BNC: Tensor, _: Tensor) -> Tensor:
    return model.forward_head(x_BNC)


def _run_pool(stage: int) -> Any:
    return lambda model, x_BNC, _: model.pools[stage - 1](x_BNC)


def _small(spec: ModelSpec) -> ModelSpec:
    """The spec with one block in each stage and at most two passes: all distinct parts of it."""
    recursions = tuple(
        2 if any(p.visit for p in spec.schedule(stage)) else 1 for stage in range(spec.stages)
    )
    return spec.with_values(blocks=1, recursions=recursions, order=None, loop="internal")


def _table_bytes(schedule: tuple[Pass, ...], tokens: int) -> int:
    """Bytes of a stage's permutations, and of the gathers that follow from them."""
    return INDEX_BYTES * tokens * (sum(p.shuffled for p in schedule) + _gathers(schedule))


def _gathers(schedule: tuple[Pass, ...]) -> int:
    return sum(p.gathers for p in schedule) + ends_shuffled(schedule)


@cache
def read_weights(spec: ModelSpec, device: str) -> Weights:
    """Bytes of a network's parameters and buffers on a device."""
    with torch.device("meta"):
        model = _Shapes(_small(spec))

    def sizes(module: nn.Module) -> list[int]:
        return [align_up(t.nbytes, ALIGNMENT[device]) for t in module.parameters()]

    stages = model.every_stage()
    blocks = tuple(sum(sizes(stage.blocks[0])) for stage in stages)
    nlls = tuple(sum(sizes(stage.nlls[0])) if len(stage.nlls) else 0 for stage in stages)
    banks = sum(spec.blocks[s] * blocks[s] + spec.nlls(s) * nlls[s] for s in range(spec.stages))
    rest = sum(sizes(model)) - sum(map(sum, map(sizes, stages)))
    coefficients = sum(
        4 * FLOAT_BYTES * spec.passes(s)
        for s, stage in enumerate(stages)
        if stage.lrc_P4 is not None
    )
    tables = sum(map(_table_bytes, map(spec.schedule, range(spec.stages)), spec.tokens))
    return Weights(
        blocks=blocks,
        nlls=nlls,
        rest=rest,
        parameters=banks + rest + coefficients,
        buffers=tables + sum(b.nbytes for b in model.stem.buffers()),
        largest=max(sizes(model)),
        macs=tuple(map(_pass_macs, stages, spec.tokens)),
    )


def _pass_macs(stage: Stage, tokens: int) -> int:
    """Multiply-adds of one pass with its NLL, without attention's products."""
    modules = (*stage.blocks[:1], *stage.nlls[:1])
    return tokens * sum(p.numel() for m in modules for p in m.parameters() if p.ndim > 1)
