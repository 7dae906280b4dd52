"""The spec of a Sliced Recursive Transformer, and its rules.

Source: "Sliced Recursive Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297.
"""

from collections.abc import Iterable
from functools import cached_property
from math import gcd, prod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sret_cli.runtime.errors import SretError
from sret_cli.spec.depth import MAX_LAYERS, divisors, recursions_for
from sret_cli.spec.passes import Pass
from sret_cli.spec.strict import Count, Rate, Strict, as_tuples, without_none

PER_STAGE = ("embed_dims", "num_heads", "blocks", "recursions", "slices", "recursive_slices")


Width = Annotated[int, Field(ge=1, le=65_536)]
Stride = Annotated[int, Field(ge=1, le=2)]


class ModelSpec(Strict):
    """A Sliced Recursive Transformer: everything that determines its weights and its costs.

    Fields with a value for each stage are tuples; a single value is used for all stages. The
    defaults are the preset `deep`.

    Raises:
        SretError: a value is of the wrong type or out of range, or the values do not fit together.

    Examples:
        >>> from sret_cli import ModelSpec
        >>> spec = ModelSpec(blocks=(2, 5, 3), recursions=4)
        >>> spec.layers
        40
        >>> spec.at(layers=1000).recursions
        (100, 100, 100)
    """

    is_timm: ClassVar[Literal[False]] = False  # True in `BackboneSpec`

    img_size: Annotated[int, Field(ge=1, le=16_384)] = 224
    """Height and width of the images, in pixels."""
    in_chans: Annotated[int, Field(ge=1, le=4096)] = 3
    """Channels of the images; 1 or 3 to train."""
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Number of classes; 0 builds no classifier. If not given, a run that trains takes the number
    of its data.
    """
    stem_strides: tuple[Stride, Stride, Stride] = (2, 2, 2)
    """Strides of the three convolutions of the stem, each 1 or 2."""
    embed_dims: tuple[Width, ...] = (128, 256, 512)
    """Channels of each stage; their number is the number of stages."""
    num_heads: tuple[Count, ...] = (2, 4, 8)
    """Attention heads of each stage; they have to divide its channels."""
    blocks: tuple[Count, ...] = (2, 5, 3)
    """Blocks of each stage: the sets of weights that its passes use."""
    recursions: tuple[Count, ...] = (2, 2, 2)
    """Passes through each block of a stage."""
    loop: Literal["internal", "external"] = "internal"
    """`internal` repeats each block before the next (b0 b0 b1 b1), `external` repeats the list of
    blocks (b0 b1 b0 b1).
    """
    order: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | None = None
    """The block of each pass of a stage, such as [0, 0, 1, 0], instead of `loop` and `recursions`:
    one list for each stage, or one for all.
    """
    slices: tuple[Count, ...] = (4, 4, 1)
    """Groups of tokens that attention is confined to, on the first pass through a block; 1 is no
    slicing. In a study file a single number becomes its greatest common divisor with the tokens of
    each stage.
    """
    recursive_slices: tuple[Count, ...] = (4, 4, 1)
    """The same on later passes; if not given, a single number of `slices` sets them too."""
    shuffle: Literal["random", "fixed", "none"] = "random"
    """Permutation of tokens before later sliced passes: `random` draws a new one at each training
    step and uses fixed ones in evaluation, `fixed` always uses the fixed ones, `none` does not
    permute.
    """
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 3.0
    """Hidden units of a block's MLP, as a multiple of its channels, rounded down."""
    nll: Literal["per_pass", "per_block", "none"] = "per_block"
    """Non-linear projection layers after the passes: `per_pass` has one for each pass (as in the
    reference), `per_block` one for each block (so that recursions add no parameters), `none` has
    none.
    """
    nll_ratio: Annotated[float, Field(gt=0, le=64)] = 1.0
    """Hidden units of an NLL, as a multiple of its channels, rounded down."""
    residual: Literal["lrc", "plain", "layerscale", "rezero", "sqrt", "loop", "deepnorm"] = "lrc"
    """Rule by which the output of a branch f is added to the stream x:

    - `lrc`: c1*x + c2*f(LN(x)), learned scalars that start at 1, for each block or, with
      `lrc = "per_pass"`, for each pass (SReT, arXiv 2111.05297)
    - `plain`: x + f(LN(x))
    - `layerscale`: x + g*f(LN(x)), g learned for each channel, starting at 0.1 (up to 18 layers),
      1e-5 (up to 24) or 1e-6 (CaiT, arXiv 2103.17239)
    - `rezero`: x + a*f(LN(x)), one learned scalar that starts at 0 (ReZero, arXiv 2003.04887)
    - `sqrt`: x + f(LN(x)) / sqrt(layers) (depth-muP, arXiv 2310.02244)
    - `loop`: x + f(LN(x)) / (recursions * sqrt(blocks)), with the recursions of the stage and the
      blocks of the model: passes through one block are correlated and add up linearly, different
      blocks add up as independent ones (arXiv 2606.18524)
    - `deepnorm`: LN(a*x + f(x)), a = M^(1/4) for M branches, whose value, output and MLP weights
      start smaller by (4M)^(-1/4) (DeepNet, arXiv 2203.00555)
    """
    lrc: Literal["per_block", "per_pass"] = "per_block"
    """Learned coefficients of `residual = "lrc"`: four for each block, or four for each pass."""
    drop_rate: Rate = 0.0
    """Probability of dropout after the stem, in MLPs and NLLs, and after attention."""
    attn_drop_rate: Rate = 0.0
    """Probability of dropout of the attention weights."""
    drop_path_rate: Rate = 0.0
    """Probability that a branch of the last pass is dropped for an image in training;
    `drop_path_ramp` gives that of earlier passes.
    """
    drop_path_ramp: Literal["per_pass", "per_block"] = "per_pass"
    """`per_pass` rises linearly from 0 at the first pass to `drop_path_rate` at the last;
    `per_block` gives all passes through a block one rate, by the formula of the SReT code.
    """

    @model_validator(mode="before")
    @classmethod
    def _one_value_for_all_stages(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise SretError(f"a model is a table of fields, not {data!r}")
        lists = {k: as_tuples(v) for k, v in without_none(data, cls).items()}
        dims = lists.get("embed_dims", cls.model_fields["embed_dims"].default)
        stages = len(dims) if isinstance(dims, tuple) else 3
        order = lists.get("order")
        if isinstance(order, tuple) and order and not isinstance(order[0], tuple):
            lists["order"] = (order,) * stages
        return {
            k: (v,) * stages if k in PER_STAGE and not isinstance(v, tuple) else v
            for k, v in lists.items()
        }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in PER_STAGE:
            if len(getattr(self, name)) != self.stages or not self.stages:
                raise SretError(
                    f"{name} has {len(getattr(self, name))} values for {self.stages} stages "
                    f"(embed_dims {self.embed_dims}); give one value for each stage, or one for all"
                )
        if self.order is not None:
            self._check_order(self.order)
        if self.layers > MAX_LAYERS:
            raise SretError(
                f"{self.layers:,} layers are more than the {MAX_LAYERS:,} that sret builds; "
                "use fewer recursions"
            )
        if self.sides[0] == 1:
            raise SretError(
                f"the stem leaves one token of a {self.img_size}-px image; use img_size "
                f"{prod(self.stem_strides) + 1} or more, or smaller stem_strides"
            )
        if self.embed_dims[0] % 2:
            raise SretError(
                f"stage 1: the stem halves the width, and {self.embed_dims[0]} is odd; "
                "use an even number in embed_dims"
            )
        for index, (width, heads) in enumerate(zip(self.embed_dims, self.num_heads, strict=True)):
            if width % heads:
                raise SretError(
                    f"stage {index + 1}: {heads} heads do not divide the width {width}; "
                    f"use embed_dims of {width - width % heads or heads} or other num_heads"
                )
            if index and width % self.embed_dims[index - 1]:
                raise SretError(
                    f"stage {index + 1}: its width {width} is not a multiple of the "
                    f"{self.embed_dims[index - 1]} before it; the depthwise convolution between "
                    "stages needs one (e.g. twice)"
                )
            for ratio in ("mlp_ratio", "nll_ratio"):
                if int(getattr(self, ratio) * width) < 1:
                    raise SretError(
                        f"stage {index + 1}: {ratio} {getattr(self, ratio)} of the width {width} "
                        "leaves no hidden unit; use a larger ratio"
                    )
            self._check_slices(index)
        return self

    def _check_order(self, order: tuple[tuple[int, ...], ...]) -> None:
        if len(order) != self.stages:
            raise SretError(
                f"order has {len(order)} lists for {self.stages} stages; "
                "give one list of blocks for each stage, or one for all"
            )
        for stage, (blocks, visited) in enumerate(zip(self.blocks, order, strict=True)):
            if set(visited) != set(range(blocks)):
                raise SretError(
                    f"stage {stage + 1}: order {list(visited)} does not visit its blocks "
                    f"0 to {blocks - 1}, each at least once; change it, or set blocks"
                )

    def _check_slices(self, stage: int) -> None:
        tokens, side = self.tokens[stage], self.sides[stage]
        for name in ("slices", "recursive_slices"):
            slices = getattr(self, name)[stage]
            if tokens % slices:
                near = sorted(divisors(tokens), key=lambda d: (abs(d - slices), d))[:3]
                fits = ", ".join(map(str, sorted(near)))
                raise SretError(
                    f"stage {stage + 1}: {slices} slices ({name}) do not divide {tokens} tokens "
                    f"({side}x{side}); use {fits}, or --slices, which fits each stage"
                )

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.embed_dims)

    @cached_property
    def sides(self) -> tuple[int, ...]:
        """Height (and width) of each stage's square of tokens."""
        side = self.img_size
        for stride in self.stem_strides:  # 3x3 convolutions, padding 1: ceil(side / stride)
            side = -(-side // stride)
        sides = [side]
        while len(sides) < self.stages:
            sides.append(-(-sides[-1] // 2))
        return tuple(sides)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each stage."""
        return tuple(side * side for side in self.sides)

    @property
    def layers(self) -> int:
        """Passes of all stages; NLLs are not counted."""
        return sum(self.passes(stage) for stage in range(self.stages))

    def passes(self, stage: int) -> int:
        """Number of passes of a stage."""
        if self.order is not None:
            return len(self.order[stage])
        return self.blocks[stage] * self.recursions[stage]

    def hidden(self, stage: int, kind: Literal["mlp", "nll"]) -> int:
        """Hidden units of a stage's MLP or NLL, rounded down as in the reference."""
        return int(getattr(self, f"{kind}_ratio") * self.embed_dims[stage])

    def nlls(self, stage: int) -> int:
        """Number of NLLs of a stage, each with its own weights."""
        banks = {"per_pass": self.passes(stage), "per_block": self.blocks[stage], "none": 0}
        return banks[self.nll]

    def schedule(self, stage: int) -> tuple[Pass, ...]:
        """The passes of a stage (0-based), in the order in which they run."""
        blocks, recursions = self.blocks[stage], self.recursions[stage]
        order: Iterable[int]
        if self.order is not None:
            order = self.order[stage]
        elif self.loop == "internal":
            order = [block for block in range(blocks) for _ in range(recursions)]
        else:
            order = list(range(blocks)) * recursions
        passes, visits, astray = [], [0] * blocks, False
        for index, block in enumerate(order):
            visit = visits[block]
            visits[block] += 1
            slices = self.recursive_slices[stage] if visit else self.slices[stage]
            shuffled = visit > 0 and slices > 1 and self.shuffle != "none"
            gathers = shuffled or (astray and slices > 1)
            astray = shuffled or (astray and not gathers)
            passes.append(
                Pass(
                    block=block,
                    visit=visit,
                    nll={"per_pass": index, "per_block": block, "none": None}[self.nll],
                    slices=slices,
                    shuffled=shuffled,
                    gathers=gathers,
                )
            )
        return tuple(passes)

    def branch_scales(self, stage: int) -> tuple[float, float]:
        """Constant factors of the stream and of the branch in a stage's residual sums.

        They are 1 and 1 if the rule has learned coefficients or none.
        """
        if self.residual == "sqrt":
            return 1.0, self.layers**-0.5
        if self.residual == "loop":
            recursions = self.passes(stage) / self.blocks[stage]
            return 1.0, 1 / (recursions * sum(self.blocks) ** 0.5)
        if self.residual == "deepnorm":
            return self.branches**0.25, 1.0
        return 1.0, 1.0

    @property
    def branches(self) -> int:
        """Number of residual sums in the network: 2 for each layer, or 3 with its NLL."""
        return self.layers * (2 if self.nll == "none" else 3)

    def drop_path_rates(self, stage: int) -> tuple[float, ...]:
        """Drop-path rate of each pass of a stage.

        "per_pass" rises from 0 to `drop_path_rate` over all passes. "per_block" has one rate for
        all passes through a block: `drop_path_rate * (b + i) / layers` for block i of a stage with
        b passes before it. This is the published formula; its last rate is below `drop_path_rate`.
        """
        before, last = sum(map(self.passes, range(stage))), max(self.layers - 1, 1)
        if self.drop_path_ramp == "per_block":
            blocks = (p.block for p in self.schedule(stage))
            return tuple(self.drop_path_rate * (before + block) / self.layers for block in blocks)
        rates = (self.drop_path_rate * (before + i) / last for i in range(self.passes(stage)))
        return tuple(rates)

    def at(
        self,
        *,
        layers: int | None = None,
        slices: int | None = None,
        recursive_slices: int | None = None,
    ) -> "ModelSpec":
        """The same design at another depth or slicing.

        Args:
            layers: exact number of layers; the recursions of the stages keep their proportions.
            slices: becomes gcd(slices, tokens) in each stage, for first and later passes.
            recursive_slices: the same, only for later passes.

        Raises:
            SretError: no recursions give exactly `layers`, or the slices divide no stage's tokens.
        """
        values: dict[str, Any] = {}
        if layers is not None:
            if self.order is not None:
                raise SretError("layers follow from `order`; change that, or leave it out")
            values["recursions"] = recursions_for(layers, self.blocks, self.recursions)
        if slices is not None:
            values["slices"] = values["recursive_slices"] = self.fit_slices(slices)
        if recursive_slices is not None:
            values["recursive_slices"] = self.fit_slices(recursive_slices)
        return self.with_values(**values)

    def with_fitted(self, **values: Any) -> Self:
        """A copy with other values; single numbers of slices are fitted to each stage.

        Raises:
            SretError: a value is of the wrong type, or the values do not fit together.
        """
        keys = ("slices", "recursive_slices")
        fits = {k: values.pop(k) for k in keys if not isinstance(values.get(k, ()), list | tuple)}
        for key, wanted in fits.items():
            if not isinstance(wanted, int) or isinstance(wanted, bool):
                raise SretError(f"{key} = {wanted!r}: give one whole number for all stages")
        if "slices" in fits and "recursive_slices" not in {**values, **fits}:
            fits["recursive_slices"] = fits["slices"]
        # The tokens are known once the spec is built, so it is built with 1 slice first.
        spec = self.with_values(**values, **dict.fromkeys(fits, 1))
        return spec.with_values(**{key: spec.fit_slices(wanted) for key, wanted in fits.items()})

    def fit_slices(self, wanted: int) -> tuple[int, ...]:
        """The slices of each stage for one wanted number: gcd(wanted, tokens).

        Raises:
            SretError: the number is not positive, or has no divisor in common with any stage's
                tokens.
        """
        if wanted < 1:
            raise SretError(
                f"{wanted} slices: attention needs at least 1 slice; 1 turns slicing off"
            )
        fitted = tuple(gcd(wanted, tokens) for tokens in self.tokens)
        if wanted > 1 and max(fitted) == 1:
            counts = sorted({d for tokens in self.tokens for d in divisors(tokens) if d > 1})
            near = sorted(sorted(counts, key=lambda d: (abs(d - wanted), d))[:4])
            raise SretError(
                f"{wanted} slices divide no stage: the stages have "
                f"{', '.join(map(str, self.tokens))} tokens; use "
                + (", ".join(map(str, near)) or "1, or larger images")
            )
        return fitted
