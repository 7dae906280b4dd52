"""Widths that meet a budget of parameters or FLOPs, and the untied twins of a model."""

import operator
from bisect import bisect_right
from collections.abc import Iterable
from itertools import product
from math import ceil, floor, gcd, lcm
from typing import NamedTuple

from sret_cli.cost.count import Signatures, count, count_passes, schedule_signatures
from sret_cli.runtime.errors import SretError, nearest_choice
from sret_cli.spec.depth import divisors
from sret_cli.spec.model import ModelSpec

TOLERANCE = 0.01  # of the budget
MAX_WIDTH = 65_536  # of the last stage
TWIN_KINDS = ("layers", "params", "macs")


class Candidate(NamedTuple):
    """Widths or blocks of the stages, and the cost of the model that has them."""

    sizes: tuple[int, ...]
    cost: int


def fit_width(spec: ModelSpec, *, params: int | None = None, macs: int | None = None) -> ModelSpec:
    """The same depth, slices and sharing at the width that meets a budget within 1 %.

    Stages keep the ratios of their widths. Heads keep their width and change their number if that
    comes within 1 %; else they keep their number; else each stage takes the number of heads that
    divides its width and comes nearest to the width that heads had. The number of heads changes
    neither parameters nor multiply-adds.

    Raises:
        SretError: there is not exactly one budget, or no width meets it; the message names the
            next narrower and the next wider model.
    """
    if (params is None) == (macs is None):
        raise SretError(f"a width meets one budget: give params ({params}) or macs ({macs})")
    kind, wanted = ("macs", macs or 0) if params is None else ("params", params)
    fitted, near = _fit(spec, kind, wanted)
    if fitted is None:
        hint = f"ask for the {kind} of one of these, or change blocks or mlp_ratio"
        raise _refusal("no width has", wanted, kind, near, hint)
    return fitted


def twin_spec(spec: ModelSpec, kind: str) -> ModelSpec:
    """The control of a model with shared weights: an untied one, whose blocks run once each.

    - "layers": as many layers of the same width, each with weights of its own.
    - "params": as many layers, narrower, so that the parameters match within 1 %.
    - "macs": as many layers at the width whose multiply-adds match within 1 %. That is the same
      width where first and later passes have the same slices.

    Widths and heads are as in `fit_width`. Where a step of the width is too large, the next larger
    widths are tried with fewer layers, in proportion to the stages. All passes of a twin are first
    passes: they have `slices`, and nothing is shuffled. A model without shared weights is its own
    twin.

    Raises:
        SretError: the kind is unknown, or nothing matches; the message names the nearest models.
    """
    if kind not in TWIN_KINDS:
        raise SretError(f"unknown twin {kind!r}; {nearest_choice(str(kind), list(TWIN_KINDS))}")
    depths = tuple(map(spec.passes, range(spec.stages)))
    if not any(map(operator.gt, depths, spec.blocks)):
        return spec
    untied = spec.with_values(
        blocks=depths, recursions=1, loop="internal", order=None, recursive_slices=spec.slices
    )
    if kind == "layers":
        return untied
    wanted = getattr(count(spec), kind)
    fitted, near = _fit(untied, kind, wanted)
    if fitted is not None:
        return fitted
    start = near[-1].sizes[0]
    for width in range(start, 2 * max(start, spec.embed_dims[0]) + 1, 2):
        wide = _at_width(untied, _scaled(spec, width))
        for spread in (0, 1):
            blocks = _best(_near_depths(wide, kind, wanted, spread), wanted)
            if blocks is not None:
                return wide.with_values(blocks=blocks)
    hint = "take the layers twin, or a wider model"
    raise _refusal("no untied model has the shared one's", wanted, kind, near, hint)


def _best(near: Iterable[Candidate], wanted: int) -> tuple[int, ...] | None:
    """The sizes whose cost is nearest to what is wanted; None if none is within 1 %."""
    best = min(near, key=lambda candidate: abs(candidate.cost - wanted))
    return best.sizes if abs(best.cost - wanted) <= TOLERANCE * wanted else None


def _refusal(what: str, wanted: int, kind: str, near: list[Candidate], hint: str) -> SretError:
    models = " and ".join(f"embed_dims {c.sizes} has {c.cost:,}" for c in near)
    return SretError(f"{what} {wanted:,} {kind} within 1 %: {models}; {hint}")


def _fit(spec: ModelSpec, kind: str, wanted: int) -> tuple[ModelSpec | None, list[Candidate]]:
    """The spec at the width that `fit_width` describes, if any, and the nearest widths."""
    ratios, passes = _scaled(spec, 1), schedule_signatures(spec)
    near: list[Candidate] = []
    for parts in (_head_widths(spec), spec.num_heads, (1,) * spec.stages):
        # The first stage's width is a multiple of this; the stem halves it.
        step = lcm(2, *(n // gcd(n, ratio) for n, ratio in zip(parts, ratios, strict=True)))
        near = _near_widths(spec, passes, kind, wanted, step)
        best = _best(near, wanted)
        if best is not None:
            return _at_width(spec, best), near
    return None, near


def _scaled(spec: ModelSpec, width: int) -> tuple[int, ...]:
    """The stages' widths if the first is `width`."""
    return tuple(width * (dim // spec.embed_dims[0]) for dim in spec.embed_dims)


def _head_widths(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(map(operator.floordiv, spec.embed_dims, spec.num_heads))


def _at_width(spec: ModelSpec, dims: tuple[int, ...]) -> ModelSpec:
    """The spec with other widths, and with heads as `fit_width` describes."""
    widths = _head_widths(spec)
    heads = tuple(
        min(divisors(dim), key=lambda number: abs(dim / number - width))
        for dim, width in zip(dims, widths, strict=True)
    )
    if any(map(operator.mod, dims, widths)) and not any(map(operator.mod, dims, spec.num_heads)):
        heads = spec.num_heads
    return spec.with_values(embed_dims=dims, num_heads=heads)


def _near_widths(
    spec: ModelSpec, passes: Signatures, kind: str, wanted: int, step: int
) -> list[Candidate]:
    """The widest model that costs at most what is wanted and the next wider one, if they exist."""

    def candidate(width: int) -> Candidate:
        dims = _scaled(spec, width)
        cost = count_passes(spec.with_values(embed_dims=dims, num_heads=1), passes)
        return Candidate(dims, getattr(cost, kind))

    narrowest, ratio = step, min(spec.mlp_ratio, spec.nll_ratio)
    while int(ratio * narrowest) < 1:
        narrowest += step  # each MLP needs a hidden unit
    widest = max(narrowest, MAX_WIDTH * spec.embed_dims[0] // spec.embed_dims[-1])
    widths = range(narrowest, widest + 1, step)
    wider = bisect_right(widths, wanted, key=lambda width: candidate(width).cost)
    return [candidate(width) for width in widths[max(0, wider - 1) : wider + 1]]


def _near_depths(spec: ModelSpec, kind: str, wanted: int, spread: int) -> list[Candidate]:
    """Untied models with fewer blocks: in proportion, rounded, and up to `spread` more or less."""

    def cost(blocks: tuple[int, ...]) -> int:
        return getattr(count(spec.with_values(blocks=blocks)), kind)

    ones = (1,) * spec.stages
    least = cost(ones)
    each = [cost((*ones[:s], 2, *ones[s + 1 :])) - least for s in range(spec.stages)]
    ratio = (wanted - least + sum(each)) / sum(map(operator.mul, each, spec.blocks))
    choices = [
        range(max(1, floor(ratio * n) - spread), min(n, max(1, ceil(ratio * n)) + spread) + 1)
        for n in spec.blocks
    ]
    return [
        Candidate(blocks, least + sum((n - 1) * one for n, one in zip(blocks, each, strict=True)))
        for blocks in product(*choices)
    ]
