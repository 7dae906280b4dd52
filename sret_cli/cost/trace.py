"""The exact costs of a complete model: parameters, multiply-adds, activations, bytes kept.

One multiply-add counts as one, as in fvcore and in the SReT paper's "FLOPs" column. fvcore adds
element counts of LayerNorm, BatchNorm and pooling (about 1 %); softmax, GELU and residual sums are
not counted. `activations` are the elements that convolutions, linear layers and matrix products
put out; fused attention puts out no score matrix. `activation_bytes` are what autograd keeps of one
image for the backward pass, in fp32, without parameters and the masks of dropout.

Passes of the same shape and slices cost the same, so each kind of pass is traced once and
multiplied. timm models are traced completely, and the costs of many recursions follow from those of
two and three.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from sret_cli.cost.breakdown import Counts, Part, Profile
from sret_cli.cost.module_costs import count_module
from sret_cli.cost.parts import HeadPart, PassPart, ReturnPart
from sret_cli.model.backbone import build_backbone
from sret_cli.model.blocks import NLL, Block
from sret_cli.model.kinds import build_any, count_layers
from sret_cli.model.sret import Pool, Stem, parameter_count
from sret_cli.runtime.errors import SretError
from sret_cli.spec.backbone import BackboneSpec, Spec
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.passes import ends_shuffled

_traced: dict[tuple, Counts] = {}


def profile(spec: Spec, full: bool = False) -> Profile:
    """The exact costs of a model, traced by fvcore and autograd.

    One multiply-add counts as one, as in fvcore and in the SReT paper's "FLOPs" column. LayerNorm,
    BatchNorm and pooling are counted by fvcore's rules; softmax and GELU are not counted. Each kind
    of pass is traced once, so any depth takes about the same time.

    Args:
        spec: an SReT or a timm model.
        full: trace every pass of the built model instead, which takes time in proportion to depth.

    Raises:
        SretError: timm cannot build the model, or an operator that computes matrix products has no
            rule.

    Examples:
        >>> from sret_cli import PRESETS, profile
        >>> costs = profile(PRESETS["nano"].at(layers=1000))
        >>> costs.layers, costs.params, costs.macs
        (1000, 331842, 887683968)
    """
    if full:
        return trace_full(spec)
    return trace_backbone(spec) if spec.is_timm else trace_costs(spec)


def known_costs(model: Any) -> dict[str, int | None]:
    """Layers, parameters and multiply-adds of a built model, by the names of their columns.

    Layers are None for a timm model without repeated blocks. Multiply-adds are None if it has an
    operator without a counting rule.
    """
    try:
        macs: int | None = profile(model.spec).macs
    except SretError:
        macs = None
    return {"layers": count_layers(model), "params": parameter_count(model), "macs": macs}


def trace_costs(spec: ModelSpec) -> Profile:
    """The exact costs of a spec, from one trace of each distinct part.

    Its multiply-adds equal the total of a full fvcore trace (`count_module`) to the unit, at any
    depth, in a time that does not grow with depth.

    Raises:
        SretError: an operator that computes matrix products has no rule.
    """
    image = (spec.in_chans, spec.img_size, spec.img_size)
    stem_key = (spec.embed_dims[0], spec.stem_strides)
    parts = [_part(None, "stem", 1, lambda: Stem(spec), image, stem_key)]
    for stage in range(spec.stages):
        parts += _stage_parts(spec, stage)
    tokens = (spec.tokens[-1], spec.embed_dims[-1])
    parts.append(_part(None, "head", 1, lambda: HeadPart(spec), tokens, (spec.num_classes,)))
    params_by_stage = tuple(_stage_params(spec, stage) for stage in range(spec.stages))
    outside = sum(part.counts.params for part in parts if part.stage is None)
    pos_embed = spec.embed_dims[0] * spec.sides[0] ** 2
    return Profile(
        spec=spec,
        layers=spec.layers,
        params=sum(params_by_stage) + outside + pos_embed,
        params_by_stage=params_by_stage,
        parts=tuple(parts),
    )


def _part(
    stage: int | None,
    label: str,
    times: int,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    key: tuple,
) -> Part:
    """A part that is traced where no part of the same label, input shape and key was before."""
    signature = (label, shape, *key)
    if signature not in _traced:
        with torch.random.fork_rng(devices=[]):
            _traced[signature] = count_module(build(), torch.zeros(1, *shape))
    return Part(stage, label, times, _traced[signature])


def _stage_parts(spec: ModelSpec, stage: int) -> list[Part]:
    """The pool before a stage, its kinds of passes, and the return to the tokens' own order."""
    parts, shape = [], (spec.tokens[stage], spec.embed_dims[stage])
    if stage:
        before = (spec.tokens[stage - 1], spec.embed_dims[stage - 1])
        key: tuple = (spec.embed_dims[stage],)
        parts.append(_part(None, "pools", 1, lambda: Pool(spec, stage - 1), before, key))
    schedule = spec.schedule(stage)
    for (slices, gathers), times in Counter((p.slices, p.gathers) for p in schedule).items():
        key = (
            spec.num_heads[stage],
            spec.hidden(stage, "mlp"),
            spec.nll != "none" and spec.hidden(stage, "nll"),
            spec.residual,
            spec.lrc,
            slices,
            gathers and spec.shuffle,
        )
        parts.append(
            _part(
                stage=stage,
                label="pass",
                times=times,
                build=partial(PassPart, spec, stage, slices, gathers),
                shape=shape,
                key=key,
            )
        )
    if ends_shuffled(schedule):
        key = (spec.shuffle,)
        parts.append(_part(stage, "return", 1, lambda: ReturnPart(spec, stage), shape, key))
    return parts


def _stage_params(spec: ModelSpec, stage: int) -> int:
    """Parameters of a stage's blocks, NLLs and coefficients per pass."""
    with torch.device("meta"):  # only shapes are needed
        block, nll = (parameter_count(module(spec, stage)) for module in (Block, NLL))
    per_pass = spec.residual == "lrc" and spec.lrc == "per_pass"
    coefficients = 4 * spec.passes(stage) * per_pass
    return spec.blocks[stage] * block + spec.nlls(stage) * nll + coefficients


@cache
def trace_backbone(spec: BackboneSpec) -> Profile:
    """The exact costs of a timm model, from full traces with at most three recursions.

    Each further recursion costs what the third one adds, because it repeats the same passes.

    Raises:
        SretError: timm cannot build the model, or a matrix product has no rule.
    """
    if spec.recursions > 3:
        two, three = (trace_backbone(spec.with_values(recursions=n)) for n in (2, 3))
        first, more = two.parts[0].counts, _minus(three.parts[0].counts, two.parts[0].counts)
        times = spec.recursions - 2
        params = first.params + times * more.params
        parts = (Part(None, "model", 1, first), Part(None, "recursion", times, more))
        layers = two.layers and two.layers // 2 * spec.recursions
        return Profile(spec=spec, layers=layers, params=params, params_by_stage=(), parts=parts)
    return _full_profile(spec, lambda: build_backbone(spec))


def _minus(counts: Counts, other: Counts) -> Counts:
    macs = Counter(dict(counts.macs_by_kind))
    macs.subtract(dict(other.macs_by_kind))
    return Counts(
        params=counts.params - other.params,
        macs_by_kind=tuple(macs.items()),
        activations=counts.activations - other.activations,
        activation_bytes=counts.activation_bytes - other.activation_bytes,
    )


def trace_full(spec: Spec) -> Profile:
    """The exact costs of a model from a trace of all its passes, to check `trace_costs`."""
    return _full_profile(spec, lambda: build_any(spec))


def _full_profile(spec: Spec, build: Callable[[], nn.Module]) -> Profile:
    with torch.random.fork_rng(devices=[]):
        model = build()
        counts = count_module(model, torch.zeros(1, spec.in_chans, spec.img_size, spec.img_size))
    parts = (Part(None, "model", 1, counts),)
    return Profile(
        spec=spec,
        layers=count_layers(model),
        params=counts.params,
        params_by_stage=(),
        parts=parts,
    )
