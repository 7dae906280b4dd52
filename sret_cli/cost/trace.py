"""What a model costs, exactly: parameters, multiply-adds and activations, by fvcore.

One multiply-add counts as one, as in fvcore and in the SReT paper's "FLOPs" column. fvcore adds
element counts of LayerNorm, BatchNorm and pooling (about 1 %); softmax, GELU and residual sums are
not counted. It has no rule for fused attention, so one is registered here: both of its matrix
products. `activations` are elements that convolutions, linear layers and matrix products put out;
fused attention puts out no score matrix. `activation_bytes` are what autograd really keeps of one
image for the backward pass, in fp32, without parameters and the masks of dropout.

Passes of equal shape and slices cost the same: each such signature is traced once and multiplied.
timm's models are traced whole; the costs of many recursions follow from those of two and three.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sret_cli.cost.breakdown import Counts, Part, Profile
from sret_cli.model.backbone import build_backbone
from sret_cli.model.blocks import NLL, Block
from sret_cli.model.kinds import build_any, count_layers
from sret_cli.model.sret import Pool, SReT, Stem
from sret_cli.model.stage import one_pass
from sret_cli.runtime.errors import SretError
from sret_cli.spec.backbone import BackboneSpec, Spec
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.run import Run
from sret_cli.spec.schedule import ends_shuffled

with warnings.catch_warnings():  # fvcore uses torch.jit, whose deprecation is no news to our user
    warnings.simplefilter("ignore")
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis


# Operators that do matrix products: one of these without a rule would be a silent gap.
PRODUCT = re.compile(r"mm_?$|mv_?$|matmul|conv|dot|attention|einsum|linear|lstm|gru|rnn|cdist|fft")


class _Pass(nn.Module):
    """One pass and its NLL, alone: what a signature is traced on."""

    order_N: Tensor | None

    def __init__(self, spec: ModelSpec, stage: int, slices: int, gathers: bool) -> None:
        super().__init__()
        spec = spec.with_values(drop_rate=0.0, attn_drop_rate=0.0)
        self.block = Block(spec, stage)
        self.nll = NLL(spec, stage) if spec.nll != "none" else None
        own = spec.residual == "lrc" and spec.lrc == "per_pass"
        self.lrc_4 = nn.Parameter(torch.ones(4)) if own else None
        self.slices = slices
        _hold_order(self, spec, stage, gathers)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return one_pass(self.block, self.nll, self.slices, x_BNC, self.order_N, lrc_4=self.lrc_4)


class _Return(nn.Module):
    """The gather that puts a stage's tokens back in their order, where its last pass has not."""

    order_N: Tensor

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        _hold_order(self, spec, stage, True)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.index_select(1, self.order_N)


def _hold_order(module: nn.Module, spec: ModelSpec, stage: int, gathers: bool) -> None:
    order_N = torch.arange(spec.tokens[stage]) if gathers else None
    if spec.shuffle == "fixed":  # then it is a buffer, and not kept for the backward pass
        module.register_buffer("order_N", order_N)
    else:
        module.__dict__["order_N"] = order_N


class _Head(nn.Module):
    """Norm and classifier, as `SReT.forward_head` applies them."""

    forward = SReT.forward_head

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.embed_dims[-1]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.num_classes) if spec.num_classes else nn.Identity()


_traced: dict[tuple, Counts] = {}


def trace_costs(spec: ModelSpec) -> Profile:
    """The exact costs of a spec, from one trace of each distinct part.

    Its multiply-adds equal the total of a full fvcore trace (`count_module`) to the unit, at any
    depth, in a time that does not grow with depth.

    Raises:
        SretError: an operator that does matrix products has no rule.
    """
    sides, tokens, dims = spec.sides, spec.tokens, spec.embed_dims

    def part(
        stage: int | None,
        label: str,
        times: int,
        module: Callable[[], nn.Module],
        shape: tuple[int, ...],
        *key: object,
    ) -> Part:
        signature = (label, shape, *key)
        if signature not in _traced:
            with torch.random.fork_rng(devices=[]):
                _traced[signature] = count_module(module(), torch.zeros(1, *shape))
        return Part(stage, label, times, _traced[signature])

    image = (spec.in_chans, spec.img_size, spec.img_size)
    stem_key = (dims[0], spec.stem_strides)
    parts = [part(None, "stem", 1, partial(Stem, spec), image, *stem_key)]
    params_by_stage = []
    for stage in range(spec.stages):
        shape = (tokens[stage], dims[stage])
        if stage:
            before = (tokens[stage - 1], dims[stage - 1])
            pool = partial(Pool, spec, stage - 1)
            parts.append(part(None, "pools", 1, pool, before, dims[stage]))
        schedule = spec.schedule(stage)
        signatures = Counter((p.slices, p.gathers) for p in schedule)
        key = (
            spec.num_heads[stage],
            spec.hidden(stage, "mlp"),
            spec.nll != "none" and spec.hidden(stage, "nll"),
            spec.residual,
            spec.lrc,
        )
        for (slices, gathers), times in signatures.items():
            module = partial(_Pass, spec, stage, slices, gathers)
            parts.append(
                part(stage, "pass", times, module, shape, *key, slices, gathers and spec.shuffle)
            )
        if ends_shuffled(schedule):
            back = partial(_Return, spec, stage)
            parts.append(part(stage, "return", 1, back, shape, spec.shuffle))
        with torch.device("meta"):  # shapes alone
            banks = ((Block, spec.blocks[stage]), (NLL, spec.nlls(stage)))
            sizes = [n * sum(p.numel() for p in m(spec, stage).parameters()) for m, n in banks]
        per_pass = spec.residual == "lrc" and spec.lrc == "per_pass"
        params_by_stage.append(sum(sizes) + 4 * spec.passes(stage) * per_pass)
    head = part(None, "head", 1, partial(_Head, spec), (tokens[-1], dims[-1]), spec.num_classes)
    parts.append(head)
    alone = sum(p.counts.params for p in parts if p.stage is None)
    params = sum(params_by_stage) + alone + dims[0] * sides[0] ** 2
    return Profile(spec, spec.layers, params, tuple(params_by_stage), tuple(parts))


@cache
def trace_backbone(spec: BackboneSpec) -> Profile:
    """The exact costs of a backbone, from full traces of the model with three recursions at most.

    Every further recursion costs what the third adds to two: the same passes once more.

    Raises:
        SretError: timm cannot build the model so, or a matrix product has no rule.
    """
    if spec.recursions > 3:
        two, three = (trace_backbone(spec.with_values(recursions=n)) for n in (2, 3))
        first, more = two.parts[0].counts, _minus(three.parts[0].counts, two.parts[0].counts)
        times = spec.recursions - 2
        params = first.params + times * more.params
        parts = (Part(None, "model", 1, first), Part(None, "recursion", times, more))
        layers = two.layers and two.layers // 2 * spec.recursions
        return Profile(spec, layers, params, (), parts)
    with torch.random.fork_rng(devices=[]):
        model = build_backbone(spec)
        counts = count_module(model, torch.zeros(1, spec.in_chans, spec.img_size, spec.img_size))
    whole = Part(None, "model", 1, counts)
    return Profile(spec, count_layers(model), counts.params, (), (whole,))


def _minus(counts: Counts, other: Counts) -> Counts:
    macs = Counter(dict(counts.macs_by_kind))
    macs.subtract(dict(other.macs_by_kind))
    names = ("params", "activations", "activation_bytes")
    differences = {name: getattr(counts, name) - getattr(other, name) for name in names}
    return Counts(macs_by_kind=tuple(macs.items()), **differences)


def trace_full(spec: Spec) -> Profile:
    """The exact costs of a model from a trace of all its passes, to check those by signature."""
    with torch.random.fork_rng(devices=[]):
        model = build_any(spec)
        counts = count_module(model, torch.zeros(1, spec.in_chans, spec.img_size, spec.img_size))
    whole = Part(None, "model", 1, counts)
    return Profile(spec, count_layers(model), counts.params, (), (whole,))


def profile(run: Run, full: bool = False) -> Profile:
    """The exact costs of a run's model; `full` traces every pass, which takes its time."""
    return trace_full(run.model) if full else trace_any(run.model)


def trace_any(spec: Spec) -> Profile:
    """The exact costs of a model of either kind, without a trace of all its passes.

    Raises:
        SretError: timm cannot build the model so, or a matrix product has no rule.
    """
    return trace_backbone(spec) if spec.is_timm else trace_costs(spec)


def count_module(module: nn.Module, x: Tensor) -> Counts:
    """Costs of one call of any module, by a full fvcore trace in eval mode.

    Args:
        module: what to trace; its mode is put back.
        x: its input, a batch of one.

    Raises:
        SretError: an operator that does matrix products has no rule.
    """
    training = module.training
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of shapes that become constants: we want it
        flops = _quiet(FlopCountAnalysis(module, x))
        flops.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        by_operator = flops.by_module_and_operator()
        _check_rules(flops.unsupported_ops())
        activations = _quiet(ActivationCountAnalysis(module, x))
        activations.set_op_handle("aten::scaled_dot_product_attention", _output_elements)
        total_activations = int(activations.total())
    module.train()
    kept = _kept_of_one_image(module, x)
    module.train(training)
    return Counts(
        params=sum(p.numel() for p in module.parameters()),
        macs_by_kind=tuple(_by_kind(module, by_operator).items()),
        activations=total_activations,
        activation_bytes=kept,
    )


def _quiet(analysis: Any) -> Any:
    analysis.unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    return analysis


def _check_rules(unsupported: Counter[str]) -> None:
    for name in unsupported:
        space, _, operator = name.partition("::")
        if space not in ("aten", "prim") or PRODUCT.search(operator):
            raise SretError(
                f"no rule counts the multiply-adds of {name}, so the total would be too small; "
                "register one in sret_cli.profiler.count_module"
            )


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of Q @ K^T and of the scores @ V."""
    q, k, v = (tensor.type().sizes() for tensor in inputs[:3])
    scores = q[-2] * k[-2]
    batch = 1
    for size in q[:-2]:
        batch *= size
    return batch * scores * (q[-1] + v[-1])


def _output_elements(inputs: list[Any], outputs: list[Any]) -> int:
    elements = 1
    for size in outputs[0].type().sizes():
        elements *= size
    return elements


def _by_kind(module: nn.Module, by_operator: dict[str, Counter[str]]) -> Counter[str]:
    """Sorts a traced module's multiply-adds into `KINDS` (other modules: by operator)."""
    alone = {Stem: "stem", Pool: "pools", _Head: "head"}.get(type(module))
    if alone:
        return Counter({alone: int(sum(by_operator[""].values()))})
    if not isinstance(module, _Pass):
        return Counter({operator: int(macs) for operator, macs in by_operator[""].items()})
    inside = {name: int(sum(by_operator[name].values())) for name in by_operator}
    attention = int(by_operator["block.attn"]["scaled_dot_product_attention"])
    kinds = Counter(
        {
            "attention products": attention,
            "projections": inside["block.attn"] - attention,
            "mlp": inside["block.mlp"],
            "nll": inside.get("nll", 0),
        }
    )
    kinds["norms"] = inside[""] - kinds.total()
    return kinds


def _kept_of_one_image(module: nn.Module, x: Tensor) -> int:
    try:
        return saved_bytes(module, x)
    except ValueError as error:  # BatchNorm wants more than one value: what a third image adds
        if "more than 1 value per channel" not in str(error):
            raise
        two, three = (saved_bytes(module, x.repeat(n, 1, 1, 1)) for n in (2, 3))
        return three - two


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of one call, in the module's present mode.

    Every storage counts once and whole; parameters and buffers, which are there anyway, do not.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = [b.clone() for b in module.buffers()]  # BatchNorm's statistics are to stay
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = module(x.clone().requires_grad_())
    del output  # the graph held every storage until here, so that no address came twice
    with torch.no_grad():
        for buffer, old in zip(module.buffers(), state, strict=True):
            buffer.copy_(old)
    return sum(kept.values())
