"""What a spec costs, in closed form and without torch, and specs that cost what is wanted.

`count` equals to the unit what `sret_cli.profiler` traces. From it follow `fit_width`, which
solves for the width of a budget, and `twin`, the control of a model with shared weights.
"""

import operator
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from itertools import product
from math import ceil, floor, gcd, lcm
from typing import NamedTuple

from sret_cli.depth import divisors
from sret_cli.errors import SretError, nearest
from sret_cli.spec import ModelSpec, ends_shuffled

FLOAT_BYTES, INDEX_BYTES = 4, 8  # of fp32, and of the int64 of a permutation
TOLERANCE = 0.01
MAX_WIDTH = 65_536
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
TWIN_KINDS = ("layers", "params", "macs")


class Passes(NamedTuple):
    """Of a stage: how many passes have how many slices, and how often tokens are reordered."""

    by_slices: Counter[int]
    gathers: int


Signatures = tuple[Passes, ...]


class Candidate(NamedTuple):
    """The widths, or the blocks, of the stages, and what the model then costs."""

    sizes: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class Cost:
    """What one image's forward pass costs.

    Args:
        params: parameters; shared ones count once.
        products: multiply-adds of convolutions, linear layers and attention's two matrix products.
        elements: what fvcore adds for norms and pooling: 5 for each element of a LayerNorm, 2 of a
            BatchNorm in eval mode, 1 of the input of a pooling (fvcore/nn/jit_handles.py).
        activations: elements that convolutions, linear layers and attention put out.
        activation_bytes: bytes that autograd keeps of one image for the backward pass, in fp32 and
            without dropout and drop path. Attention is taken to keep one number for each token and
            head, as PyTorch's fused kernel for the CPU does; kernels for CUDA may pad that.
    """

    params: int = 0
    products: int = 0
    elements: int = 0
    activations: int = 0
    activation_bytes: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds as fvcore counts them."""
        return self.products + self.elements

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, n) + getattr(other, n) for n in _FIELDS))

    def __rmul__(self, times: int) -> "Cost":
        return Cost(*(times * getattr(self, n) for n in _FIELDS))


_FIELDS = tuple(f.name for f in fields(Cost))


def count(spec: ModelSpec) -> Cost:
    """Exact costs of one image's forward pass, without building the model.

    One multiply-add counts as one, as in fvcore and in the SReT paper's "FLOPs" column; LayerNorm,
    BatchNorm and pooling are counted by fvcore's rules, softmax and GELU are not (fvcore has none
    for them). Equals `profiler.trace`, in a fraction of a millisecond at 20 layers.
    """
    return _count(spec, signatures(spec))


def signatures(spec: ModelSpec) -> Signatures:
    """What costs depend on, of each stage's schedule."""
    return tuple(
        Passes(
            Counter(p.slices for p in schedule),
            sum(p.gathers for p in schedule) + ends_shuffled(schedule),
        )
        for schedule in map(spec.schedule, range(spec.stages))
    )


def _count(spec: ModelSpec, passes: Signatures) -> Cost:
    """As `count`, for schedules that are known: they do not depend on the width."""
    total = _stem(spec) + _head(spec)
    for stage, signature in enumerate(passes):
        if stage:
            total += _pool(spec, stage - 1)
        total += _stage(spec, stage, signature)
    return total


def _stem(spec: ModelSpec) -> Cost:
    """Three 3x3 convolutions, each with BatchNorm and ReLU, and the position embedding.

    Kept: the input of each convolution (the ReLU before has kept it), that of each BatchNorm with
    mean and deviation of each channel, and what the last ReLU puts out.
    """
    width, side, fan_in = spec.embed_dims[0], spec.img_size, spec.in_chans
    total = Cost()
    for out, stride in zip((width // 2, width, width), spec.stem_strides, strict=True):
        kept = fan_in * side**2
        side = -(-side // stride)
        size = out * side**2
        total += Cost(
            params=(9 * fan_in + 1) * out + 2 * out,
            products=9 * fan_in * size,
            elements=2 * size,
            activations=size,
            activation_bytes=FLOAT_BYTES * (kept + size + 2 * out),
        )
        fan_in = out
    return total + Cost(params=width * side**2, activation_bytes=FLOAT_BYTES * width * side**2)


def _pool(spec: ModelSpec, stage: int) -> Cost:
    """The depthwise 3x3 convolution after a stage; it keeps its input."""
    out = spec.embed_dims[stage + 1]
    size = spec.tokens[stage + 1] * out
    kept = FLOAT_BYTES * spec.tokens[stage] * spec.embed_dims[stage]
    return Cost(params=10 * out, products=9 * size, activations=size, activation_bytes=kept)


def _head(spec: ModelSpec) -> Cost:
    """Average of the tokens, norm and linear classifier."""
    width = spec.embed_dims[-1]
    classifier = _linear(1, width, spec.num_classes) if spec.num_classes else Cost()
    return Cost(elements=spec.tokens[-1] * width) + _layer_norm(1, width) + classifier


def _stage(spec: ModelSpec, stage: int, passes: Passes) -> Cost:
    """All passes of a stage, and the parameters of its blocks and NLLs, which are there once.

    A gather keeps its indices, unless they are a buffer of the model.
    """
    nll = Cost() if spec.nll == "none" else _nll(spec, stage)
    index_bytes = 0 if spec.shuffle == "fixed" else INDEX_BYTES * spec.tokens[stage]
    total, params = Cost(activation_bytes=passes.gathers * index_bytes), 0
    for slices, times in passes.by_slices.items():
        block = _block(spec, stage, slices)
        params = spec.blocks[stage] * block.params + spec.nlls(stage) * nll.params
        total += times * (block + nll)
    if spec.residual == "lrc" and spec.lrc == "per_pass":  # passes have what blocks had
        params += 4 * (passes.by_slices.total() - spec.blocks[stage])
    return replace(total, params=params)


def _block(spec: ModelSpec, stage: int, slices: int) -> Cost:
    """One pass through a block: two norms, attention, MLP and two residual connections."""
    tokens, width = spec.tokens[stage], spec.embed_dims[stage]
    attention = _attention(spec, stage, slices)
    mlp = _mlp(tokens, width, spec.hidden(stage, "mlp"))
    return 2 * _layer_norm(tokens, width) + attention + mlp + 2 * _residual(spec, stage)


def _nll(spec: ModelSpec, stage: int) -> Cost:
    """An NLL: norm, MLP and residual connection."""
    tokens, width = spec.tokens[stage], spec.embed_dims[stage]
    mlp = _mlp(tokens, width, spec.hidden(stage, "nll"))
    return _layer_norm(tokens, width) + mlp + _residual(spec, stage)


def _residual(spec: ModelSpec, stage: int) -> Cost:
    """One residual connection; learned coefficients keep what their branch puts out."""
    learned = {"lrc": 2, "rezero": 1, "layerscale": spec.embed_dims[stage]}.get(spec.residual, 0)
    kept = spec.tokens[stage] * spec.embed_dims[stage] if learned else 0
    return Cost(params=learned, activation_bytes=FLOAT_BYTES * kept)


def _attention(spec: ModelSpec, stage: int, slices: int) -> Cost:
    """Projections, and the two products of each slice.

    Kept beside the projections' inputs: q, k and v, and the logarithm of each token's sum in each
    head. What attention puts out is the input of the last projection, kept once.
    """
    tokens, width = spec.tokens[stage], spec.embed_dims[stage]
    kept = FLOAT_BYTES * tokens * (3 * width + spec.num_heads[stage])
    products = 2 * tokens * (tokens // slices) * width
    fused = Cost(products=products, activations=tokens * width, activation_bytes=kept)
    return _linear(tokens, width, 3 * width) + fused + _linear(tokens, width, width)


def _mlp(tokens: int, width: int, hidden: int) -> Cost:
    """Linear, GELU, linear; the GELU keeps its input, which the linear before put out."""
    gelu = Cost(activation_bytes=FLOAT_BYTES * tokens * hidden)
    return _linear(tokens, width, hidden) + gelu + _linear(tokens, hidden, width)


def _linear(tokens: int, fan_in: int, out: int) -> Cost:
    """A linear layer with bias; it keeps its input."""
    return Cost(
        params=(fan_in + 1) * out,
        products=tokens * fan_in * out,
        activations=tokens * out,
        activation_bytes=FLOAT_BYTES * tokens * fan_in,
    )


def _layer_norm(tokens: int, width: int) -> Cost:
    """A LayerNorm; it keeps its input, and mean and deviation of each token."""
    kept = FLOAT_BYTES * tokens * (width + 2)
    return Cost(params=2 * width, elements=5 * tokens * width, activation_bytes=kept)


def parse_quantity(value: str | int | float) -> int:
    """The whole number that a text such as "14M" or "4.2G" stands for, or a plain number.

    Raises:
        SretError: it is neither, or comes to less than 1.
    """
    text = "" if isinstance(value, bool) else str(value).strip().upper()
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([KMGT]?)", text)
    if not match:
        raise SretError(
            f"{value!r} is no quantity; write a positive number, with K, M, G or T behind it for "
            "thousands to millions of millions: 14M, 4.2G"
        )
    quantity = round(Decimal(match[1]) * SUFFIXES[match[2]])
    if quantity < 1:
        raise SretError(f"{value!r} comes to {quantity}; give 1 or more, such as 14M or 4.2G")
    return quantity


def fit_width(spec: ModelSpec, *, params: int | None = None, macs: int | None = None) -> ModelSpec:
    """The same depth, slices and sharing at the width that meets a budget within 1 %.

    Stages keep the ratios of their widths. Heads keep their width and change their number where
    that comes within 1 %; else they keep their number; else each stage takes the number that
    divides its width and brings heads nearest to the width they had. Heads cost nothing: neither
    parameters nor multiply-adds depend on them.

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


def twin(spec: ModelSpec, kind: str) -> ModelSpec:
    """The control of a model with shared weights: an untied one, of blocks passed through once.

    - "layers": as many layers of the same width, each with weights of its own.
    - "params": as many layers, narrower, until the parameters match within 1 %.
    - "macs": as many layers at the width whose multiply-adds match within 1 %: the same width where
      first and later passes have the same slices.

    Widths and heads are as in `fit_width`. Where a step of the width is too large, the next wider
    widths are tried, each with as many layers fewer, in the proportion of the stages, as it takes.
    All passes of a twin are first passes: they take `slices`, and nothing is shuffled. A model
    without shared weights is its own twin.

    Raises:
        SretError: there is no such kind, or nothing matches; the message names the neighbours.
    """
    if kind not in TWIN_KINDS:
        raise SretError(f"unknown twin {kind!r}; {nearest(str(kind), list(TWIN_KINDS))}")
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
    """The sizes that cost most nearly what is wanted, or None where none is within 1 %."""
    best = min(near, key=lambda candidate: abs(candidate.cost - wanted))
    return best.sizes if abs(best.cost - wanted) <= TOLERANCE * wanted else None


def _refusal(what: str, wanted: int, kind: str, near: list[Candidate], hint: str) -> SretError:
    models = " and ".join(f"embed_dims {c.sizes} has {c.cost:,}" for c in near)
    return SretError(f"{what} {wanted:,} {kind} within 1 %: {models}; {hint}")


def _fit(spec: ModelSpec, kind: str, wanted: int) -> tuple[ModelSpec | None, list[Candidate]]:
    """The spec at the width that `fit_width` describes, if any, and the neighbours."""
    ratios, passes = _scaled(spec, 1), signatures(spec)
    near: list[Candidate] = []
    for parts in (_head_widths(spec), spec.num_heads, (1,) * spec.stages):
        # The width of the first stage goes in steps of this; the stem halves it.
        step = lcm(2, *(n // gcd(n, ratio) for n, ratio in zip(parts, ratios, strict=True)))
        near = _near_widths(spec, passes, kind, wanted, step)
        best = _best(near, wanted)
        if best is not None:
            return _at_width(spec, best), near
    return None, near


def _scaled(spec: ModelSpec, width: int) -> tuple[int, ...]:
    """The stages' widths where the first is `width`."""
    return tuple(width * (dim // spec.embed_dims[0]) for dim in spec.embed_dims)


def _head_widths(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(map(operator.floordiv, spec.embed_dims, spec.num_heads))


def _at_width(spec: ModelSpec, dims: tuple[int, ...]) -> ModelSpec:
    """The spec with other widths, and with heads as `fit_width` says."""
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
    """The widest that costs at most what is wanted, and the next wider; of those there are."""

    def candidate(width: int) -> Candidate:
        dims = _scaled(spec, width)
        cost = _count(spec.with_values(embed_dims=dims, num_heads=1), passes)
        return Candidate(dims, getattr(cost, kind))

    narrowest, ratio = step, min(spec.mlp_ratio, spec.nll_ratio)
    while int(ratio * narrowest) < 1:
        narrowest += step  # until each MLP has a hidden unit
    widest = max(narrowest, MAX_WIDTH * spec.embed_dims[0] // spec.embed_dims[-1])
    widths = range(narrowest, widest + 1, step)
    wider = bisect_right(widths, wanted, key=lambda width: candidate(width).cost)
    return [candidate(width) for width in widths[max(0, wider - 1) : wider + 1]]


def _near_depths(spec: ModelSpec, kind: str, wanted: int, spread: int) -> list[Candidate]:
    """Untied models with fewer layers: each stage's share, rounded and up to `spread` off."""

    def cost(blocks: tuple[int, ...]) -> int:
        return getattr(count(spec.with_values(blocks=blocks)), kind)

    ones = (1,) * spec.stages
    least = cost(ones)
    each = [cost((*ones[:s], 2, *ones[s + 1 :])) - least for s in range(spec.stages)]
    share = (wanted - least + sum(each)) / sum(map(operator.mul, each, spec.blocks))
    choices = [
        range(max(1, floor(share * n) - spread), min(n, max(1, ceil(share * n)) + spread) + 1)
        for n in spec.blocks
    ]
    return [
        Candidate(blocks, least + sum((n - 1) * one for n, one in zip(blocks, each, strict=True)))
        for blocks in product(*choices)
    ]
