"""The spec of a timm model: which one, and how its blocks recur and are tied."""

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

Arguments = tuple[tuple[str, Any], ...]  # pairs of name and plain value, sorted by name

# What timm models raise if their parts do not fit each other or the image.
MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Arguments of timm that are fields here, and those that would load weights or do not belong to the
# design of a model.
FIELDS = ("img_size", "in_chans", "num_classes", "drop_path_rate")
FOREIGN = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "model_cfg",
    "feature_cfg",
    "kwargs_filter",
    "features_only",
    "out_indices",
    "scriptable",
    "exportable",
    "no_jit",
    "device",
    "dtype",
    "model_name",
    "variant",
)


class BackboneSpec(Strict):
    """A timm model, with `recursions` passes through each of its blocks.

    With the defaults the model stays as it is in timm, so that any timm model can be a baseline.

    Raises:
        SretError: timm has no such model, the model does not take one of `timm_args`, or a value is
            of the wrong type or out of range.
    """

    is_timm: ClassVar[Literal[True]] = True

    backbone: str
    """Name of a timm model, such as `vit_tiny_patch16_224`; given instead of `preset`."""
    img_size: Annotated[int, Field(ge=1, le=16_384)]
    """Height and width of the images, in pixels; if not given, the timm model's default."""
    in_chans: Count = 3
    """Channels of the images; 1 or 3 to train."""
    num_classes: Annotated[int, Field(ge=0)] = 1000
    """Number of classes; 0 builds no classifier. If not given, a run that trains takes the number
    of its data.
    """
    recursions: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1
    """Passes through each block."""
    loop: Literal["internal", "external"] = "internal"
    """`internal` repeats each block before the next (b0 b0 b1 b1), `external` repeats the list of
    blocks (b0 b1 b0 b1).
    """
    share: Count | Literal["all"] = 1
    """Number of consecutive blocks with one set of weights, or `all` for all blocks of a stage.
    It has to divide the blocks of each stage. The number of layers stays the same.
    """
    nll: Literal["per_pass", "per_block", "none"] = "none"
    """Non-linear projection layers after the passes: `per_pass` has one for each pass, `per_block`
    one for each set of block weights, `none` has none.
    """
    nll_ratio: Annotated[float, Field(gt=0, le=64)] = 1.0
    """Hidden units of an NLL, as a multiple of its channels, rounded down."""
    drop_path_rate: Rate = 0.0
    """Drop-path rate that the timm model spreads over its blocks; 0 keeps timm's default."""
    timm_args: Arguments = ()
    """Further arguments of the timm model, such as `{ patch_size = 4 }`: a table of numbers,
    strings, true or false, and lists of them.
    """

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
                raise SretError(f"timm_args.{name} is not part of a model's design; leave it out")
        return tuple((name, plain(f"timm_args.{name}", value[name])) for name in sorted(value))

    @model_validator(mode="after")
    def _timm_takes_the_arguments(self) -> Self:
        check_arguments(self.backbone, self.timm_args)
        return self

    @model_serializer(mode="wrap")
    def _serialize(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        """The fields; empty `timm_args` are left out, so that older runs keep their ids."""
        values = handler(self)
        as_written = as_lists if info.mode == "json" else lambda value: value
        values["timm_args"] = {name: as_written(value) for name, value in self.timm_args}
        return {k: v for k, v in values.items() if k != "timm_args" or v}

    @property
    def untouched(self) -> bool:
        """Whether the model stays as it is in timm."""
        return self.recursions == 1 and self.share == 1 and self.nll == "none"

    @property
    def layers(self) -> None:
        """None: it is known once the model is built (`model.kinds.count_layers`)."""
        return None


Spec = ModelSpec | BackboneSpec


def read_spec(values: dict[str, Any]) -> Spec:
    """The spec, of either kind, whose `model_dump` gave these values."""
    return BackboneSpec(**values) if "backbone" in values else ModelSpec(**values)


def plain(name: str, value: Any) -> Any:
    """A number, a string, true or false, or a list of them as a tuple.

    Raises:
        SretError: the value is something else.
    """
    if isinstance(value, list | tuple):
        return tuple(plain(name, item) for item in value)
    if isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value)):
        return value
    raise SretError(
        f"{name} = {value!r}: give a number, a string, true or false, or a list of them"
    )


def as_lists(value: Any) -> Any:
    """A plain value with lists instead of tuples, as in JSON."""
    return [as_lists(item) for item in value] if isinstance(value, tuple) else value


@cache
def check_arguments(backbone: str, arguments: Arguments) -> None:
    """Refuses arguments that the timm model does not take; their values are checked at its build.

    Raises:
        SretError: names the argument.
    """
    if not arguments:
        return
    import timm
    import torch

    try:
        with torch.device("meta"):  # only shapes
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
        return  # a wrong value is reported when the model is built


def _parameters(cls: type) -> list[str]:
    """Names of the arguments of a model's class and of its timm base classes."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        init: Callable[..., Any] | None = base.__dict__.get("__init__")
        if init is not None and base.__module__.startswith("timm"):
            names |= dict.fromkeys(p.name for p in signature(init).parameters.values())
    known = set(FIELDS) | set(FOREIGN) | {"self", "args", "kwargs"}
    return [name for name in names if name not in known]


def default_img_size(name: str) -> int:
    """The image size in timm's pretrained config of the model of that name; 224 without a config.

    Raises:
        SretError: timm has no such model; the message names the nearest.
    """
    import timm

    architecture, _, tag = name.partition(".")
    if architecture in PRESETS:  # `model.registry` adds the presets to timm
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
