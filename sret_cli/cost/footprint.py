"""What the parts of a network take in memory at a batch size: stem, passes, pools and head.

Each distinct part is traced once, forward and backward, on shapes without data. What kernels take
inside (oneDNN's copies of weights in another layout, buffers of each thread) is a matter of the
processor, and counts for small models alone: on a CPU small parts are run to see it.
"""

from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sret_cli.cost.allocations import most_allocated
from sret_cli.cost.liveness import ALIGNMENT, Forward, Trace, Usage, fake_module, trace_storages
from sret_cli.model.sret import SReT
from sret_cli.model.stage import Stage, one_pass
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.schedule import Pass, ends_shuffled

FLOAT_BYTES, INDEX_BYTES = 4, 8
RUN_BYTES = 16 * 2**20  # parts of at most so many bytes are run on a CPU: milliseconds each


class Setting(NamedTuple):
    """How a step is run, as far as memory knows."""

    batch_size: int
    precision: str = "fp32"
    device: str = "cuda"
    opt: str = "adamw"


class Weights(NamedTuple):
    """Bytes of parameters, and of buffers, as allocated."""

    blocks: tuple[int, ...]  # one block of each stage
    nlls: tuple[int, ...]  # one NLL of each stage
    rest: int  # stem, pools, head
    parameters: int
    buffers: int
    largest: int
    macs: tuple[int, ...]  # of one pass of each stage, without attention's products


class StageParts(NamedTuple):
    """A stage's passes, with what each takes at one batch size, and the pool before them.

    `drawn` are the bytes that are drawn at random before the first pass: gathers and drop path.
    """

    schedule: tuple[Pass, ...]
    usages: tuple[Usage, ...]
    pool: Usage | None
    drawn: int


class Parts(NamedTuple):
    """The whole network at one batch size."""

    stem: Usage
    stages: tuple[StageParts, ...]
    head: Usage


class _Shapes(SReT):
    """The network without values: a fake tensor cannot be looked at, as its initialisation does."""

    def _initialise(self) -> None:
        for stage in self.every_stage():  # they are made on the CPU
            stage.gathers_RN = torch.empty_like(stage.gathers_RN, device=self.pos_embed.device)


class _Call(NamedTuple):
    """A part of the network: what to call, with a batch of which shape."""

    forward: Forward
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_image: bool


_traced: dict[tuple, tuple[Trace, Trace]] = {}
_ran: dict[tuple, int] = {}


def read_parts(spec: ModelSpec, setting: Setting) -> Parts:
    """What the parts of a network take, from a trace of each that is not known yet."""
    small, size = _small(spec), setting.batch_size
    calls: dict[tuple, _Call] = {}
    with ExitStack() as stack:
        models: list[SReT] = []

        def part(
            name: tuple,
            forward: Forward,
            shape: tuple[int, ...],
            dtype: torch.dtype,
            is_image: bool = False,
            loss: bool = False,
        ) -> tuple[tuple, torch.dtype]:
            """The key of a part, and the type of what it puts out."""
            key = (small, setting.device, setting.precision, name, dtype)
            calls[key] = _Call(forward, shape, dtype, is_image)
            if key not in _traced:
                if not models:
                    stack.enter_context(fake_module(setting.device))
                    models.append(_Shapes(small))
                training, inference = (
                    trace_storages(
                        models[0],
                        forward,
                        shape,
                        dtype,
                        device=setting.device,
                        precision=setting.precision,
                        loss=loss,
                        is_image=is_image,
                        trains=trains,
                    )
                    for trains in (True, False)
                )
                _traced[key] = (training, inference)
            return key, _traced[key][0].output_dtype

        image = (spec.in_chans, spec.img_size, spec.img_size)
        stem, dtype = part(("stem",), _embed, image, torch.float32, is_image=True)
        stages: list[tuple[tuple[Pass, ...], list[tuple], tuple, int]] = []
        for s in range(spec.stages):
            pool: tuple = ()  # before the first stage is none
            if s:
                before = (spec.tokens[s - 1], spec.embed_dims[s - 1])
                pool, dtype = part(("pool", s), _run_pool(s), before, dtype)
            passes, shape = [], (spec.tokens[s], spec.embed_dims[s])
            schedule, drops = spec.schedule(s), any(spec.drop_path_rates(s))
            for p in schedule:
                name = (s, p.slices, p.gathers, drops)
                key, dtype = part(name, _run_pass(s, p, drops), shape, dtype)
                passes.append(key)
            drawn = 2 * FLOAT_BYTES * size * len(schedule) if drops else 0
            if spec.shuffle == "random":
                drawn += INDEX_BYTES * spec.tokens[s] * _gathers(schedule)
            stages.append((schedule, passes, pool, drawn))
        head, _ = part(("head",), _run_head, shape, dtype, loss=True)
    usages = _usages(small, setting, calls)
    found = [
        StageParts(schedule, tuple(usages[p] for p in passes), usages.get(pool), drawn)
        for schedule, passes, pool, drawn in stages
    ]
    return Parts(usages[stem], tuple(found), usages[head])


def _usages(small: ModelSpec, setting: Setting, calls: dict[tuple, _Call]) -> dict[tuple, Usage]:
    """What each part takes; on a CPU small parts are run, which shows what kernels take inside."""
    size, model, usages = setting.batch_size, None, {}
    for key, call in calls.items():
        training, inference = _traced[key]
        peak = inference.peak_at(size)
        if setting.device == "cpu" and peak <= RUN_BYTES:
            if (key, size) not in _ran:
                if model is None:
                    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                        model = SReT(small).eval()
                _ran[key, size] = _run(model, call, setting)
            peak = max(peak, _ran[key, size])
        usages[key] = training.at(size)._replace(inference_peak=peak)
    return usages


def _run(model: SReT, call: _Call, setting: Setting) -> int:
    """The most bytes that a part holds when it is run on the CPU, its input included."""
    x = torch.zeros(setting.batch_size, *call.shape, dtype=call.dtype)
    ones_2B11 = torch.ones(2, setting.batch_size, 1, 1)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16")

    def forward() -> None:
        with torch.inference_mode(), cast:
            call.forward(model, x, ones_2B11)

    forward()  # kernels are chosen
    return most_allocated(forward) + (0 if call.is_image else x.nbytes)


def inference_peak(parts: Parts) -> int:
    """The most that a forward pass without a graph holds, besides weights and the batch.

    Until a stage returns, its caller holds its input, and the map that its pool read.
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
    """A pass with slices and gather of another; its order and drop path are drawn before it."""

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
    """One block in each stage, and two passes where there are more: all there is to trace."""
    recursions = tuple(
        2 if any(p.visit for p in spec.schedule(stage)) else 1 for stage in range(spec.stages)
    )
    return spec.with_values(blocks=1, recursions=recursions, order=None, loop="internal")


def _table_bytes(schedule: tuple[Pass, ...], tokens: int) -> int:
    """Of a stage's permutations, and of the gathers that follow from them."""
    return INDEX_BYTES * tokens * (sum(p.shuffled for p in schedule) + _gathers(schedule))


def _gathers(schedule: tuple[Pass, ...]) -> int:
    return sum(p.gathers for p in schedule) + ends_shuffled(schedule)


@cache
def read_weights(spec: ModelSpec, device: str) -> Weights:
    """Bytes of a network's parameters and buffers on a device."""
    align = ALIGNMENT[device]
    small = _small(spec)
    with torch.device("meta"):
        model = _Shapes(small)

    def sizes(module: nn.Module) -> list[int]:
        tensors = module.parameters()
        return [-(-t.numel() * t.element_size() // align) * align for t in tensors]

    stages = [stage for stage in model.stages if isinstance(stage, Stage)]
    blocks = tuple(sum(sizes(stage.blocks[0])) for stage in stages)
    nlls = tuple(sum(sizes(stage.nlls[0])) if len(stage.nlls) else 0 for stage in stages)
    banks = sum(spec.blocks[s] * blocks[s] + spec.nlls(s) * nlls[s] for s in range(spec.stages))
    outside = [t for name, t in model.named_parameters() if not name.startswith("stages.")]
    rest = sum(-(-t.numel() * t.element_size() // align) * align for t in outside)
    own = sum(
        4 * FLOAT_BYTES * spec.passes(s) for s in range(spec.stages) if stages[s].lrc_P4 is not None
    )
    permutations = sum(map(_table_bytes, map(spec.schedule, range(spec.stages)), spec.tokens))
    norms = sum(b.numel() * b.element_size() for b in model.stem.buffers())
    matrices = [
        [
            p.numel()
            for m in (stage.blocks[:1], stage.nlls[:1])
            for p in m.parameters()
            if p.ndim > 1
        ]
        for stage in stages
    ]
    return Weights(
        blocks,
        nlls,
        rest,
        banks + rest + own,
        permutations + norms,
        max(sizes(model)),
        tuple(tokens * sum(each) for tokens, each in zip(spec.tokens, matrices, strict=True)),
    )
