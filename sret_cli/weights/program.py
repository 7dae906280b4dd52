"""Models as programs of torch.export, in which repeated passes are one loop.

A stage of an exported SReT loops over passes of the same kind: torch's `scan`, which is `Scan` in
ONNX. The file then holds the shared weights and the operations of each block once, at any depth,
and 1,000 layers are exported in the time of 20. The loop goes over the permutations that evaluation
uses, which are constants of the program. The passes of a timm model are unrolled; the file holds
its tied weights once too.

Tensors carry their shape in their name: B batch, N tokens, C channels, K passes of a cycle, S
shuffled passes of a cycle, R permutations of a stage, P passes of a stage.

`torch.ops.higher_order.scan` is private API of torch; `tests/weights/test_private_torch.py` has a
test for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.fx import GraphModule

from sret_cli.model.sret import SReT, build_model
from sret_cli.model.stage import Stage
from sret_cli.runtime.errors import SretError, as_out_of_memory, first_line
from sret_cli.spec.backbone import MISFITS, Spec

MAX_PERIOD = 64  # longer cycles of a schedule are not looked for


class Cycle(NamedTuple):
    """`period` passes of a schedule, from the pass `start`, that run `repeats` times in all."""

    start: int
    period: int
    repeats: int


def find_cycles(kinds: Sequence[Any]) -> list[Cycle]:
    """A schedule as cycles; each covers most passes from its start on, with the shortest period."""
    cycles, start = [], 0
    while start < len(kinds):
        best = Cycle(start, 1, 1)
        for period in range(1, min(MAX_PERIOD, (len(kinds) - start) // 2) + 1):
            end, first = start + period, kinds[start : start + period]
            while kinds[end : end + period] == first:
                end += period
            repeats = (end - start) // period
            if repeats > 1 and repeats * period > best.repeats * best.period:
                best = Cycle(start, period, repeats)
        cycles.append(best)
        start += best.period * best.repeats
    return cycles


class LoopedStage(Stage):
    """A stage whose repeated passes are one loop of the exported program."""

    def forward(
        self,
        x_BNC: Tensor,
        passes: Sequence[int] | None = None,
        gathers_SN: Tensor | None = None,
        lrcs_K4: Tensor | None = None,
    ) -> Tensor:
        """Runs the schedule, or some of its passes with their gathers and LRCs."""
        if passes is not None:
            orders = iter(() if gathers_SN is None else gathers_SN.unbind())
            lrcs = [None] * len(passes) if lrcs_K4 is None else lrcs_K4.unbind()
            for index, lrc_4 in zip(passes, lrcs, strict=True):
                order_N = next(orders) if self.schedule[index].gathers else None
                x_BNC = self.run_pass(x_BNC, index, order_N, lrc_4=lrc_4)
            return x_BNC
        kinds = [(p.block, p.nll, p.slices, p.gathers) for p in self.schedule]
        for cycle in find_cycles(kinds):
            x_BNC = self._loop(x_BNC, cycle)
        return x_BNC.index_select(1, self.gathers_RN[-1]) if self.ends_shuffled else x_BNC

    def _loop(self, x_BNC: Tensor, cycle: Cycle) -> Tensor:
        start, period, repeats = cycle
        passes = range(start, start + period)
        before = sum(p.gathers for p in self.schedule[:start])
        gathers = sum(self.schedule[index].gathers for index in passes)
        own = {}  # tensors that differ from round to round
        if gathers:
            rows_RN = self.gathers_RN[before : before + repeats * gathers]
            own["gathers_SN"] = rows_RN.unflatten(0, (repeats, gathers))
        if self.lrc_P4 is not None:
            rows_P4 = self.lrc_P4[start : start + repeats * period]
            own["lrcs_K4"] = rows_P4.unflatten(0, (repeats, period))
        if repeats == 1:
            return self(x_BNC, passes, **{name: tensor[0] for name, tensor in own.items()})
        weights = dict(self.named_parameters())
        rounds = list(own.values()) or [torch.zeros(repeats, 1)]  # scan needs a tensor

        def body(x_BNC: Tensor, *tensors: Tensor) -> list[Tensor]:
            given = dict(zip(own, tensors[: len(own)], strict=True))
            shared = dict(zip(weights, tensors[len(rounds) :], strict=True))
            return [functional_call(self, shared, (x_BNC, passes), given)]

        # The public `scan` calls dynamo, which refuses the unpacked coefficients of a block: they
        # are views of one parameter. This is the operator that it would create.
        scan = torch.ops.higher_order.scan
        (x_BNC,) = scan(body, [x_BNC], rounds, tuple(weights.values()))
        return x_BNC


def to_program(model: Any) -> ExportedProgram:
    """The model's evaluation as a program of torch.export, for batches of any size.

    Raises:
        SretError: torch.export cannot export the timm model.
    """
    spec = model.spec
    if not spec.is_timm:
        return _exported(_with_loops(model), spec)
    with backbone_errors_as_refusals(spec, "as a program of torch.export"):
        return _exported(_with_parameters_registered(model), spec)


def _exported(module: nn.Module, spec: Spec) -> ExportedProgram:
    images = torch.zeros(2, spec.in_chans, spec.img_size, spec.img_size)
    module.eval().requires_grad_(False)
    batch = Dim("batch", min=1)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},), strict=False)
    for graph in (m for m in program.graph_module.modules() if isinstance(m, GraphModule)):
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # it holds paths of this machine
    return program


def _with_loops(model: SReT) -> SReT:
    """A copy whose stages are loops."""
    spec = model.spec
    looped = build_model(spec)
    looped.stages = nn.ModuleList(LoopedStage(spec, stage) for stage in range(spec.stages))
    looped.load_state_dict(model.state_dict())
    for stage in looped.every_stage():  # evaluation uses only gathers_RN
        del stage.permutations_PN
    return looped


def _with_parameters_registered(model: nn.Module) -> nn.Module:
    """A copy of a timm model whose tied blocks have their parameters registered.

    torch.export needs that; `model.backbone` keeps them as plain attributes.
    """
    copy = deepcopy(model)
    for module in copy.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, nn.Parameter):
                delattr(module, name)
                module.register_parameter(name, value)
    return copy


@contextmanager
def backbone_errors_as_refusals(spec: Spec, what: str) -> Iterator[None]:
    """Turns an error of an exporter that cannot export a timm model into a user's error."""
    try:
        yield
    except MISFITS as error:
        if as_out_of_memory(error) is not None or not spec.is_timm:
            raise
        raise SretError(
            f"{spec.backbone} cannot be written {what}: {first_line(error)}; use --to safetensors"
        ) from None
