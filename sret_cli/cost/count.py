"""What a spec costs, in closed form and without torch.

`count` equals, to the unit, what `cost.trace` traces.
"""

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from sret_cli.spec.model import ModelSpec
from sret_cli.spec.passes import ends_shuffled

FLOAT_BYTES, INDEX_BYTES = 4, 8  # fp32, and the int64 of labels and permutations


class Passes(NamedTuple):
    """What the costs of a stage's passes depend on.

    Attributes:
        by_slices: for each number of slices, the number of passes that have it.
        gathers: how often tokens are reordered.
    """

    by_slices: Counter[int]
    gathers: int


Signatures = tuple[Passes, ...]


@dataclass(frozen=True)
class Cost:
    """What one image's forward pass costs.

    Attributes:
        params: parameters; shared ones count once.
        products: multiply-adds of convolutions, linear layers and attention's two matrix products.
        elements: what fvcore adds for norms and pooling: 5 for each element of a LayerNorm, 2 for
            each element of a BatchNorm in eval mode, and 1 for each input element of a pooling
            (fvcore/nn/jit_handles.py).
        activations: elements that convolutions, linear layers and attention put out.
        activation_bytes: bytes that autograd keeps of one image for the backward pass, in fp32,
            without dropout and drop path. Attention keeps one number for each token and head, as
            PyTorch's fused CPU kernel does; CUDA kernels may pad that.
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
    """The exact costs of one image's forward pass, without building the model.

    One multiply-add counts as one, as in fvcore and in the SReT paper's "FLOPs" column. LayerNorm,
    BatchNorm and pooling are counted by fvcore's rules; softmax and GELU are not counted, because
    fvcore has no rules for them. The result equals that of `profile`, needs no torch, and takes
    less than a millisecond at 20 layers.

    A `ModelSpec` always describes a valid model, so this raises no error of its own; making a spec
    with slices that do not divide its tokens raises an SretError.

    Examples:
        >>> from sret_cli import PRESETS, count
        >>> cost = count(PRESETS["deep"].at(layers=1000))
        >>> f"{cost.params:,} parameters, {cost.macs / 1e9:.1f} G multiply-adds"
        '14,657,700 parameters, 166.4 G multiply-adds'
    """
    return count_passes(spec, schedule_signatures(spec))


def recurrent_params(spec: ModelSpec) -> int:
    """The parameters that each recursion uses again: those of blocks, and of NLLs per block.

    The others, of stem, pooling, head and NLLs per pass, are used once.
    """
    total = 0
    for stage, blocks in enumerate(spec.blocks):
        nll = _nll(spec, stage).params if spec.nll == "per_block" else 0
        total += blocks * (_block(spec, stage, 1).params + nll)
    return total


def schedule_signatures(spec: ModelSpec) -> Signatures:
    """For each stage, what its costs depend on in its schedule."""
    return tuple(
        Passes(
            by_slices=Counter(p.slices for p in schedule),
            gathers=sum(p.gathers for p in schedule) + ends_shuffled(schedule),
        )
        for schedule in map(spec.schedule, range(spec.stages))
    )


def count_passes(spec: ModelSpec, passes: Signatures) -> Cost:
    """The result of `count` for schedules that are known; they do not depend on the width."""
    total = _stem(spec) + _head(spec)
    for stage, signature in enumerate(passes):
        if stage:
            total += _pool(spec, stage - 1)
        total += _stage(spec, stage, signature)
    return total


def _stem(spec: ModelSpec) -> Cost:
    """Three 3x3 convolutions, each with BatchNorm and ReLU, and the position embedding.

    Kept are the input of each convolution (which is the kept output of the ReLU before), the input
    of each BatchNorm with the mean and deviation of each channel, and the output of the last ReLU.
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
    """All passes of a stage, and the parameters of its blocks and NLLs, each counted once.

    A gather keeps its indices, unless they are a buffer of the model.
    """
    nll = Cost() if spec.nll == "none" else _nll(spec, stage)
    index_bytes = 0 if spec.shuffle == "fixed" else INDEX_BYTES * spec.tokens[stage]
    total, params = Cost(activation_bytes=passes.gathers * index_bytes), 0
    for slices, times in passes.by_slices.items():
        block = _block(spec, stage, slices)
        params = spec.blocks[stage] * block.params + spec.nlls(stage) * nll.params
        total += times * (block + nll)
    if (
        spec.residual == "lrc" and spec.lrc == "per_pass"
    ):  # four for each pass instead of each block
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
    """One residual connection; a learned coefficient keeps the output of its branch."""
    learned = {"lrc": 2, "rezero": 1, "layerscale": spec.embed_dims[stage]}.get(spec.residual, 0)
    kept = spec.tokens[stage] * spec.embed_dims[stage] if learned else 0
    return Cost(params=learned, activation_bytes=FLOAT_BYTES * kept)


def _attention(spec: ModelSpec, stage: int, slices: int) -> Cost:
    """Projections, and the two products of each slice.

    Kept besides the projections' inputs are q, k and v, and the logarithm of each token's sum in
    each head. The output of attention is the input of the last projection, and kept once.
    """
    tokens, width = spec.tokens[stage], spec.embed_dims[stage]
    kept = FLOAT_BYTES * tokens * (3 * width + spec.num_heads[stage])
    products = 2 * tokens * (tokens // slices) * width
    fused = Cost(products=products, activations=tokens * width, activation_bytes=kept)
    return _linear(tokens, width, 3 * width) + fused + _linear(tokens, width, width)


def _mlp(tokens: int, width: int, hidden: int) -> Cost:
    """Linear, GELU, linear; the GELU keeps its input, the output of the first linear layer."""
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
    """A LayerNorm; it keeps its input, and the mean and deviation of each token."""
    kept = FLOAT_BYTES * tokens * (width + 2)
    return Cost(params=2 * width, elements=5 * tokens * width, activation_bytes=kept)
