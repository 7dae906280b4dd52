"""What to build and how to train it: specs, presets, the schedule of passes, and their rules.

A stage is a schedule of passes over a bank of blocks. `ModelSpec.schedule` lists the passes as
plain values; models, costs and reports are views of that list. Source: "Sliced Recursive
Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297.
"""

from functools import cached_property
from math import gcd
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from sret_cli.errors import SretError, nearest
from sret_cli.strict import Strict

MAX_LAYERS = 100_000
PER_STAGE = ("embed_dims", "num_heads", "blocks", "recursions", "slices", "recursive_slices")
RESIDUALS_TO_COME = ("layerscale", "rezero", "sqrt", "loop", "deepnorm")


class Pass(NamedTuple):
    """One execution of a block: what one layer of the network is."""

    block: int
    nll: int | None
    slices: int
    shuffled: bool


Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelSpec(Strict):
    """A Sliced Recursive Transformer: everything that determines its weights and its costs.

    Per-stage fields are tuples; one value stands for all stages. The defaults are the preset
    `deep`.

    Raises:
        SretError: a value is of the wrong type or out of range, or the values do not fit together.
    """

    img_size: Annotated[int, Field(ge=1, le=16_384)] = 224
    in_chans: Count = 3
    num_classes: Annotated[int, Field(ge=0)] = 1000
    stem_strides: tuple[Literal[1, 2], Literal[1, 2], Literal[1, 2]] = (2, 2, 2)
    embed_dims: tuple[Width, ...] = (128, 256, 512)
    num_heads: tuple[Count, ...] = (2, 4, 8)
    blocks: tuple[Count, ...] = (2, 5, 3)
    recursions: tuple[Count, ...] = (2, 2, 2)
    loop: Literal["internal", "external"] = "internal"
    slices: tuple[Count, ...] = (4, 4, 1)
    recursive_slices: tuple[Count, ...] = (4, 4, 1)
    shuffle: Literal["random", "fixed", "none"] = "random"
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 3.0
    nll: Literal["per_pass", "per_block", "none"] = "per_block"
    nll_ratio: Annotated[float, Field(gt=0, le=64)] = 1.0
    residual: Literal["lrc", "plain", "layerscale", "rezero", "sqrt", "loop", "deepnorm"] = "lrc"
    drop_rate: Rate = 0.0
    attn_drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0

    @model_validator(mode="before")
    @classmethod
    def _one_value_for_all_stages(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise SretError(f"a model is a table of fields, not {data!r}")
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        dims = lists.get("embed_dims", cls.model_fields["embed_dims"].default)
        stages = len(dims) if isinstance(dims, tuple) else 3
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
        if self.residual in RESIDUALS_TO_COME:
            raise SretError(
                f"residual = {self.residual!r} is not built yet; use 'lrc' or 'plain' for now"
            )
        if self.layers > MAX_LAYERS:
            raise SretError(
                f"{self.layers:,} layers are more than the {MAX_LAYERS:,} that sret builds; "
                "use fewer recursions"
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
        return sum(b * r for b, r in zip(self.blocks, self.recursions, strict=True))

    def hidden(self, stage: int, kind: Literal["mlp", "nll"]) -> int:
        """Hidden units of a stage's MLP or NLL; a fraction is cut off, as in the reference."""
        return int(getattr(self, f"{kind}_ratio") * self.embed_dims[stage])

    def nlls(self, stage: int) -> int:
        """How many NLLs, with weights of their own, a stage holds."""
        blocks = self.blocks[stage]
        return {
            "per_pass": blocks * self.recursions[stage],
            "per_block": blocks,
            "none": 0,
        }[self.nll]

    def schedule(self, stage: int) -> tuple[Pass, ...]:
        """The passes of a stage (0-based), in their order."""
        blocks, recursions = self.blocks[stage], self.recursions[stage]
        if self.loop == "internal":
            order = [block for block in range(blocks) for _ in range(recursions)]
        else:
            order = list(range(blocks)) * recursions
        passes, seen = [], set()
        for index, block in enumerate(order):
            later = block in seen
            seen.add(block)
            slices = self.recursive_slices[stage] if later else self.slices[stage]
            passes.append(
                Pass(
                    block=block,
                    nll={"per_pass": index, "per_block": block, "none": None}[self.nll],
                    slices=slices,
                    shuffled=later and slices > 1 and self.shuffle != "none",
                )
            )
        return tuple(passes)

    def drop_path_rates(self, stage: int) -> tuple[float, ...]:
        """Drop-path rate of each pass: a ramp from 0 to `drop_path_rate` over the whole depth."""
        before = sum(self.blocks[s] * self.recursions[s] for s in range(stage))
        last = max(self.layers - 1, 1)
        passes = self.blocks[stage] * self.recursions[stage]
        return tuple(self.drop_path_rate * (before + i) / last for i in range(passes))

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
            values["recursions"] = self._recursions_for(layers)
        if slices is not None:
            values["slices"] = values["recursive_slices"] = self.fit_slices(slices)
        if recursive_slices is not None:
            values["recursive_slices"] = self.fit_slices(recursive_slices)
        return self.with_values(**values)

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

    def _recursions_for(self, layers: int) -> tuple[int, ...]:
        fewest = sum(self.blocks)
        if layers < 1:
            raise SretError(
                f"{layers} layers: a model has at least {fewest} here, one pass a block"
            )
        if layers > MAX_LAYERS:
            raise SretError(
                f"{layers:,} layers are more than the {MAX_LAYERS:,} that sret builds; use fewer"
            )
        reach = self._reachable(min(layers + 2 * fewest, MAX_LAYERS))
        if not reach[0] >> layers & 1:
            near = [n for n in range(layers - 1, fewest - 1, -1) if reach[0] >> n & 1][:1]
            near += [n for n in range(layers + 1, reach[0].bit_length()) if reach[0] >> n & 1][:1]
            if layers < fewest:
                near = [fewest]
            raise SretError(
                f"{layers} layers cannot be reached with {'+'.join(map(str, self.blocks))} blocks; "
                f"use {' or '.join(map(str, near))}"
            )
        # Stage by stage, the count nearest to proportion from which the rest can still be met.
        recursions, left = [], layers
        for stage, blocks in enumerate(self.blocks):
            goal = self.recursions[stage] * layers / self.layers
            rest = reach[stage + 1]
            fits = [r for r in range(1, left // blocks + 1) if rest >> (left - r * blocks) & 1]
            best = min(fits, key=lambda r: (abs(r - goal), r))
            recursions.append(best)
            left -= best * blocks
        return tuple(recursions)

    def _reachable(self, most: int) -> list[int]:
        """Bit n of item s says that stages s and later can have n layers together, up to `most`."""
        reach = [1]
        for blocks in reversed(self.blocks):
            bits, shift = reach[0] << blocks, blocks
            while shift <= most:
                bits |= bits << shift
                bits &= (1 << (most + 1)) - 1
                shift *= 2
            reach.insert(0, bits)
        return reach


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


class TrainSpec(Strict):
    """How a model is trained: data, optimiser and schedule, in timm's words.

    The defaults train the preset `nano` on `digits`; on a folder of images, `hflip` is 0.5 and
    `crop_pct` 0.875 where they are not given.

    Raises:
        SretError: a value is of the wrong type or out of range, or the values do not fit together.
    """

    dataset: Literal["digits", "folder"] = "digits"
    data_dir: str | None = None
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 15
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    opt: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    sched: Literal["cosine"] = "cosine"
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    smoothing: Rate = 0.1
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.5,
        1,
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    hflip: Share = 0.0
    color_jitter: Share = 0.0
    auto_augment: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "pass"] = "none"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_dataset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("dataset") == "folder":
            return {"hflip": 0.5, "crop_pct": 0.875, **data}
        return data

    @field_validator("scale", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("dataset", mode="before")
    @classmethod
    def _known_dataset(cls, value: Any) -> Any:
        if value not in ("digits", "folder"):
            raise SretError(
                f"unknown dataset {value!r}; {nearest(str(value), ['digits', 'folder'])}"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.dataset == "folder" and self.data_dir is None:
            raise SretError("dataset = 'folder' needs a folder of images; name it with --data-dir")
        if self.dataset != "folder" and self.data_dir is not None:
            raise SretError(
                f"data_dir = {self.data_dir!r} is not used by dataset = {self.dataset!r}; "
                "use --dataset folder, or leave it out"
            )
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise SretError(
                f"{self.warmup_epochs} warm-up epochs leave nothing of {self.epochs} epochs; "
                "use fewer (--set train.warmup_epochs=0)"
            )
        if self.scale[0] > self.scale[1]:
            raise SretError(f"scale = {self.scale}: the smallest crop comes first; swap the two")
        return self


_TINY: dict[str, Any] = {
    "embed_dims": (64, 128, 256),
    "num_heads": (2, 4, 8),
    "blocks": (2, 5, 3),
    "recursions": 2,
    "slices": (8, 4, 1),
    "recursive_slices": (2, 1, 1),
    "nll": "per_pass",
    "nll_ratio": 1,
}

PRESETS: dict[str, ModelSpec] = {
    "sret_t": ModelSpec(**_TINY, mlp_ratio=3.6),
    "sret_lt": ModelSpec(**_TINY, mlp_ratio=4.0),
    "sret_s": ModelSpec(
        **{**_TINY, "embed_dims": (126, 252, 504), "num_heads": (3, 6, 12), "nll_ratio": 2},
        mlp_ratio=3.0,
    ),
    "deep": ModelSpec(),
    "nano": ModelSpec(
        img_size=16,
        num_classes=10,
        stem_strides=(1, 2, 1),
        embed_dims=(32, 64, 128),
        num_heads=(1, 2, 4),
        blocks=(1, 2, 1),
        slices=(1, 1, 1),
        recursive_slices=(1, 1, 1),
    ),
}
BASE_PRESETS = tuple(PRESETS)

# The other published variants: `published.csv` has their figures.
_UNSLICED: dict[str, Any] = {"slices": 1, "recursive_slices": 1}
PRESETS |= {f"{name}_unsliced": PRESETS[name].with_values(**_UNSLICED) for name in BASE_PRESETS[:3]}
PRESETS["sret_lt_16_14"] = PRESETS["sret_lt"].with_values(slices=(16, 14, 1), recursive_slices=1)
for _name, _size in (("sret_t", 384), ("sret_s", 384), ("sret_s", 512)):
    PRESETS[f"{_name}_{_size}"] = PRESETS[_name].with_values(**_UNSLICED, img_size=_size)


def preset(name: str) -> ModelSpec:
    """The preset of that name.

    Raises:
        SretError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise SretError(f"unknown preset {name!r}; {nearest(name, list(PRESETS))}")
    return PRESETS[name]
