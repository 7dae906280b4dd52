"""Which of timm's models to build, and how its layers recur and share their weights."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sret_cli.errors import SretError
from sret_cli.spec import MAX_LAYERS, Count, ModelSpec, Rate
from sret_cli.strict import Strict


class BackboneSpec(Strict):
    """One of timm's models, each of its blocks passed through `recursions` times.

    `share` consecutive blocks have one set of weights ("all": every block of a stage has); the
    number of layers stays. `img_size` is the model's own where it is not given. The defaults leave
    the model as timm has it, so that any of its models can be a baseline.

    Raises:
        SretError: timm has no such model, or a value is of the wrong type or out of range.
    """

    backbone: str
    img_size: Annotated[int, Field(ge=1, le=16_384)]
    in_chans: Count = 3
    num_classes: Annotated[int, Field(ge=0)] = 1000
    recursions: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1
    loop: Literal["internal", "external"] = "internal"
    share: Count | Literal["all"] = 1
    nll: Literal["per_pass", "per_block", "none"] = "none"
    nll_ratio: Annotated[float, Field(gt=0, le=64)] = 1.0
    drop_path_rate: Rate = 0.0

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

    @property
    def untouched(self) -> bool:
        """Whether the model is as timm has it."""
        return self.recursions == 1 and self.share == 1 and self.nll == "none"

    @property
    def layers(self) -> None:
        """Unknown before the model is built: `recurse.count_layers` and profiles know."""
        return None


Spec = ModelSpec | BackboneSpec


def read_spec(values: dict[str, Any]) -> Spec:
    """The spec of either kind that `model_dump` gave these values."""
    return BackboneSpec(**values) if "backbone" in values else ModelSpec(**values)


def default_img_size(name: str) -> int:
    """The image size that timm's model of that name is meant for.

    Raises:
        SretError: timm has no such model; the message names the nearest.
    """
    import timm

    architecture, _, tag = name.partition(".")
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
