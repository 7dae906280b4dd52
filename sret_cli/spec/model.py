"""What to build: the spec of a model, presets, the schedule of passes, and their rules.

A stage is a schedule of passes over a bank of blocks. `ModelSpec.schedule` lists the passes as
plain values; models, costs and reports are views of that list. Source: "Sliced Recursive
Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297.
"""

from collections.abc import Iterable
from functools import cached_property
from math import gcd, prod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from sret_cli.runtime.errors import SretError
from sret_cli.spec.depth import MAX_LAYERS, divisors, recursions_for
from sret_cli.spec.strict import Count, Rate, Strict, as_tuples, without_none

PER_STAGE = ("embed_dims", "num_heads", "blocks", "recursions", "slices", "recursive_slices")


class Pass(NamedTuple):
    """One execution of a block: what one layer of the network is.

    `visit` counts the passes through the same block before it. Tokens stay as a shuffled pass has
    left them, since all but sliced attention takes them in any order: a pass `gathers` them where
    it needs another order, be it shuffled or, after a shuffled pass, the tokens' own.
    """

    block: int
    visit: int
    nll: int | None
    slices: int
    shuffled: bool
    gathers: bool


Width = Annotated[int, Field(ge=1, le=65_536)]
Stride = Annotated[int, Field(ge=1, le=2)]


def ends_shuffled(schedule: tuple[Pass, ...]) -> bool:
    """Whether a stage has to put its tokens back in their order after its last pass."""
    last = next((p for p in reversed(schedule) if p.gathers), None)
    return last is not None and last.shuffled


class ModelSpec(Strict):
    """A Sliced Recursive Transformer: everything that determines its weights and its costs.

    Per-stage fields are tuples; one value stands for all stages. The defaults are the preset
    `deep`. `order` lists the blocks of each stage's passes and stands in for `loop` and
    `recursions`. `drop_path_ramp` is explained at `drop_path_rates`. How branches are added to the
    stream, by `residual`:

    - `lrc`: c1*x + c2*f(LN(x)), learned scalars that start at 1, for each block or, with
      `lrc = "per_pass"`, for each pass (SReT, arXiv 2111.05297)
    - `plain`: x + f(LN(x))
    - `layerscale`: x + g*f(LN(x)), g learned for each channel, from 0.1 (to 18 layers), 1e-5 (to
      24) or 1e-6 (CaiT, arXiv 2103.17239)
    - `rezero`: x + a*f(LN(x)), one learned scalar that starts at 0 (ReZero, arXiv 2003.04887)
    - `sqrt`: x + f(LN(x)) / sqrt(layers) (depth-muP, arXiv 2310.02244)
    - `loop`: x + f(LN(x)) / (recursions * sqrt(blocks)): passes through one block are correlated
      and add up linearly, blocks as independent ones do (arXiv 2606.18524)
    - `deepnorm`: LN(a*x + f(x)), a = M^(1/4) for M branches, whose value, output and MLP weights
      start smaller by (4M)^(-1/4) (DeepNet, arXiv 2203.00555)

    Raises:
        SretError: a value is of the wrong type or out of range, or the values do not fit together.
    """

    is_timm: ClassVar[Literal[False]] = False  # a `BackboneSpec` is a timm model's

    img_size: Annotated[int, Field(ge=1, le=16_384)] = 224
    """Height and width of the images, in pixels."""
    in_chans: Annotated[int, Field(ge=1, le=4096)] = 3
    """Channels of the images."""
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Classes; those of the data where a run trains."""
    stem_strides: tuple[Stride, Stride, Stride] = (2, 2, 2)
    """Strides of the three convolutions of the stem."""
    embed_dims: tuple[Width, ...] = (128, 256, 512)
    """Channels of each stage."""
    num_heads: tuple[Count, ...] = (2, 4, 8)
    """Attention heads of each stage."""
    blocks: tuple[Count, ...] = (2, 5, 3)
    """Blocks of each stage: sets of shared weights."""
    recursions: tuple[Count, ...] = (2, 2, 2)
    """Passes through each block, by stage."""
    loop: Literal["internal", "external"] = "internal"
    """`internal` repeats each block before the next (b0 b0 b1 b1), `external` repeats the list of
    blocks (b0 b1 b0 b1).
    """
    order: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | None = None
    """The blocks of a stage's passes, one by one, instead of `loop` and `recursions`: [0, 0, 1, 0].
    """
    slices: tuple[Count, ...] = (4, 4, 1)
    """Groups that attention is confined to, on the first pass through a block. A single number
    takes its greatest common divisor with each stage's tokens.
    """
    recursive_slices: tuple[Count, ...] = (4, 4, 1)
    """The same on later passes; `slices` where only that is given."""
    shuffle: Literal["random", "fixed", "none"] = "random"
    """Permutation of tokens before later sliced passes: `random` is drawn anew at each training
    step and fixed in evaluation, `fixed` is seeded, `none` leaves the order.
    """
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 3.0
    """Hidden units of a block's MLP, as a multiple of its channels."""
    nll: Literal["per_pass", "per_block", "none"] = "per_block"
    """Non-linear projection layers after the passes: one for each pass (the reference), one for
    each block (no parameters with depth), or none.
    """
    nll_ratio: Annotated[float, Field(gt=0, le=64)] = 1.0
    """Hidden units of an NLL, as a multiple of its channels."""
    residual: Literal["lrc", "plain", "layerscale", "rezero", "sqrt", "loop", "deepnorm"] = "lrc"
    """How a branch is added to the stream; docs/models.md compares the rules."""
    lrc: Literal["per_block", "per_pass"] = "per_block"
    """Learned residual coefficients for each block, or for each pass."""
    drop_rate: Rate = 0.0
    """Dropout of the MLPs and projections."""
    attn_drop_rate: Rate = 0.0
    """Dropout of the attention weights."""
    drop_path_rate: Rate = 0.0
    """Drop path of the last pass; earlier passes drop in proportion to their depth."""
    drop_path_ramp: Literal["per_pass", "per_block"] = "per_pass"
    """`per_pass` climbs over all passes; `per_block` gives all passes through a block one rate, by
    the formula of the SReT code.
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
                    f"stage {index + 1}: its width {width} is no multiple of the "
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
                    f"0 to {blocks - 1}, each at least once; mend it, or set blocks"
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
        """How many stages the model has."""
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
        """How many passes a stage has."""
        if self.order is not None:
            return len(self.order[stage])
        return self.blocks[stage] * self.recursions[stage]

    def hidden(self, stage: int, kind: Literal["mlp", "nll"]) -> int:
        """Hidden units of a stage's MLP or NLL; a fraction is cut off, as in the reference."""
        return int(getattr(self, f"{kind}_ratio") * self.embed_dims[stage])

    def nlls(self, stage: int) -> int:
        """How many NLLs, with weights of their own, a stage holds."""
        banks = {"per_pass": self.passes(stage), "per_block": self.blocks[stage], "none": 0}
        return banks[self.nll]

    def schedule(self, stage: int) -> tuple[Pass, ...]:
        """The passes of a stage (0-based), in their order."""
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
        """Constants that a stage's residual sums multiply the stream and the branch with.

        1 and 1 where the rule has learned coefficients or none.
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
        """Residual sums on the way through the network: 2 a layer, or 3 with its NLL."""
        return self.layers * (2 if self.nll == "none" else 3)

    def drop_path_rates(self, stage: int) -> tuple[float, ...]:
        """Drop-path rate of each pass, of a ramp over the passes or, as published, the blocks.

        "per_pass" climbs from 0 to `drop_path_rate` over all passes. "per_block" has one rate for
        all passes through a block: `drop_path_rate * (b + i) / layers` for block i of a stage with
        b passes before it, which climbs by blocks and skips by passes, and so ends below the top.
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

        `layers` sets the stages' recursions in proportion to what they are, to exactly that many
        layers. `slices` takes gcd(slices, tokens) in each stage, for first and later passes;
        `recursive_slices` does so for later passes alone.

        Raises:
            SretError: no recursion counts reach `layers`, or the slices divide no stage's tokens.
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
        """A copy with other values; single numbers of slices fit each stage, as `--slices` does.

        Raises:
            SretError: a value is of the wrong type, or the values do not fit together.
        """
        keys = ("slices", "recursive_slices")
        fits = {k: values.pop(k) for k in keys if not isinstance(values.get(k, ()), list | tuple)}
        for key, wanted in fits.items():
            if not isinstance(wanted, int) or isinstance(wanted, bool):
                raise SretError(f"{key} = {wanted!r}: give one whole number for the whole model")
        if "slices" in fits and "recursive_slices" not in {**values, **fits}:
            fits["recursive_slices"] = fits["slices"]
        # One slice fits any stage: the numbers wanted are fitted once the tokens are known.
        spec = self.with_values(**values, **dict.fromkeys(fits, 1))
        return spec.with_values(**{key: spec.fit_slices(wanted) for key, wanted in fits.items()})

    def fit_slices(self, wanted: int) -> tuple[int, ...]:
        """The slices of each stage that come nearest to what is wanted: gcd(wanted, tokens).

        Raises:
            SretError: the number is not positive, or shares a divisor with no stage's tokens.
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
