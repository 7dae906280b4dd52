"""Which of timm's models to build, and how its layers recur and share their weights."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from inspect import signature
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from sret_cli.runtime.errors import SretError, nearest_choice
from sret_cli.spec.depth import MAX_LAYERS
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.strict import Count, Rate, Strict

Arguments = tuple[tuple[str, Any], ...]  # names, sorted, and plain values

# What timm's models raise where their parts do not fit each other or the image.
MISFITS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    ValueError,
)

# Arguments of timm's that are fields here, or would load weights or make something else of a model.
FIELDS = ("img_size", "in_chans", "num_classes", "drop_path_rate")
FOREIGN = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    *("pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "cache_dir"),
    *("model_cfg", "feature_cfg", "kwargs_filter", "features_only", "out_indices"),
    *("scriptable", "exportable", "no_jit", "device", "dtype", "model_name", "variant"),
)


class BackboneSpec(Strict):
    """One of timm's models, each of its blocks passed through `recursions` times.

    `share` consecutive blocks have one set of weights ("all": every block of a stage has); the
    number of layers stays. `img_size` is the model's own where it is not given. `timm_args` are
    further arguments for timm's model, such as `patch_size`: a table of numbers, texts, true or
    false, and lists of them, kept as sorted pairs. The defaults leave the model as timm has it, so
    that any of its models can be a baseline.

    Raises:
        SretError: timm has no such model, its model takes no such argument, or a value is of the
            wrong type or out of range.
    """

    is_timm: ClassVar[Literal[True]] = True

    backbone: str
    """Name of a timm model, in place of `preset`."""
    img_size: Annotated[int, Field(ge=1, le=16_384)]
    """Height and width of the images; the model's own if not given."""
    in_chans: Count = 3
    """Channels of the images."""
    num_classes: Annotated[int, Field(ge=0)] = 1000
    """Classes; those of the data where a run trains."""
    recursions: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1
    """Passes through each block."""
    loop: Literal["internal", "external"] = "internal"
    """`internal` repeats each block before the next, `external` repeats the list of blocks."""
    share: Count | Literal["all"] = 1
    """Consecutive blocks that have one set of weights, or `all` blocks of a stage."""
    nll: Literal["per_pass", "per_block", "none"] = "none"
    """Non-linear projection layers after the passes: one for each pass, one for each block, or
    none.
    """
    nll_ratio: Annotated[float, Field(gt=0, le=64)] = 1.0
    """Hidden units of an NLL, as a multiple of its channels."""
    drop_path_rate: Rate = 0.0
    """Drop path, as timm's model spreads it over its blocks."""
    timm_args: Arguments = ()
    """Further arguments of timm's model, such as `{ patch_size = 4 }`."""

    @model_validator(mode="before")
    @classmethod
    def _img_size_of_the_model(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("backbone"), str):
            return data
        size = default_img_size(data["backbone"])
        return {**data, "img_size": size} if data.get("img_size") is None else data

    @field_validator("share", mode="before")
    @classmethod
    def _share_is_a_number_or_all(cls, value: Any) -> Any:
        if value == "all" or (isinstance(value, int) and value >= 1 and value is not True):
            return value
        raise SretError(f"share = {value!r}: give a number of consecutive blocks, or 'all'")

    @field_validator("timm_args", mode="before")
    @classmethod
    def _timm_args_are_plain(cls, value: Any) -> Arguments:
        if isinstance(value, tuple):  # those of another spec
            value = dict(value)
        if not isinstance(value, dict):
            raise SretError(f"timm_args = {value!r}: write a table, such as {{ patch_size = 8 }}")
        for name in value:
            if name in FIELDS:
                raise SretError(f"timm_args.{name}: {name} is a field of the model; set it there")
            if name in FOREIGN:
                raise SretError(f"timm_args.{name} is no matter of a model's design; leave it out")
        return tuple((name, plain(f"timm_args.{name}", value[name])) for name in sorted(value))

    @model_validator(mode="after")
    def _timm_takes_the_arguments(self) -> Self:
        check_arguments(self.backbone, self.timm_args)
        return self

    @model_serializer(mode="wrap")
    def _serialize(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        """Fields, without `timm_args` where there are none: older runs keep their ids."""
        values = handler(self)
        as_written = as_lists if info.mode == "json" else lambda value: value
        values["timm_args"] = {name: as_written(value) for name, value in self.timm_args}
        return {k: v for k, v in values.items() if k != "timm_args" or v}

    @property
    def untouched(self) -> bool:
        """Whether the model is as timm has it."""
        return self.recursions == 1 and self.share == 1 and self.nll == "none"

    @property
    def layers(self) -> None:
        """Unknown before the model is built: `model.kinds.count_layers` and profiles know."""
        return None


Spec = ModelSpec | BackboneSpec


def read_spec(values: dict[str, Any]) -> Spec:
    """The spec of either kind that `model_dump` gave these values."""
    return BackboneSpec(**values) if "backbone" in values else ModelSpec(**values)


def plain(name: str, value: Any) -> Any:
    """A number, a text, true or false, or a list of them as a tuple.

    Raises:
        SretError: the value is something else.
    """
    if isinstance(value, list | tuple):
        return tuple(plain(name, item) for item in value)
    if isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value)):
        return value
    raise SretError(f"{name} = {value!r}: give a number, a text, true or false, or a list of them")


def as_lists(value: Any) -> Any:
    """A plain value as JSON has it, without tuples."""
    return [as_lists(item) for item in value] if isinstance(value, tuple) else value


@cache
def check_arguments(backbone: str, arguments: Arguments) -> None:
    """Refuses an argument that timm's model does not take; its value is checked when it is built.

    Raises:
        SretError: names the argument.
    """
    if not arguments:
        return
    import timm
    import torch

    try:
        with torch.device("meta"):  # shapes alone
            timm.create_model(backbone, **dict(arguments))
    except TypeError as error:
        unknown = "unexpected keyword argument" in str(error)
        for name, _ in arguments:
            if unknown and f"'{name}'" in str(error):
                with torch.device("meta"):
                    known = _parameters(type(timm.create_model(backbone)))
                raise SretError(
                    f"timm_args.{name}: {backbone} takes no such argument; "
                    f"{nearest_choice(name, known)}"
                ) from None
    except MISFITS:
        return  # what is wrong with a value is said where the model is built


def _parameters(cls: type) -> list[str]:
    """Names of the arguments of a model's class and, where it passes them on, of its bases."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        init: Callable[..., Any] | None = base.__dict__.get("__init__")
        if init is not None and base.__module__.startswith("timm"):
            names |= dict.fromkeys(p.name for p in signature(init).parameters.values())
    known = set(FIELDS) | set(FOREIGN) | {"self", "args", "kwargs"}
    return [name for name in names if name not in known]


def default_img_size(name: str) -> int:
    """The image size that timm's model of that name is meant for.

    Raises:
        SretError: timm has no such model; the message names the nearest.
    """
    import timm

    architecture, _, tag = name.partition(".")
    if architecture in PRESETS:  # which timm knows, too, once our models are in its registry
        raise SretError(f"{name!r} is a preset, not a timm model; use --preset {name}")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else "timm.list_models() names them"
        raise SretError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        raise SretError(
            f"timm has a model {architecture!r} but no weights {tag!r} for it; leave .{tag} out"
        ) from None
    return config.input_size[-1] if config is not None else 224
