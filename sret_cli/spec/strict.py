"""The base class of specs: frozen, strict values whose errors are one line."""

from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from sret_cli.runtime.errors import SretError, nearest_choice

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NOT_STAGES = ("scale", "stem_strides", "recursions_range", "decay_milestones")


def as_tuples(value: Any) -> Any:
    """A value from a file with all its lists, also nested ones, as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def without_none(data: dict[str, Any], cls: type[BaseModel]) -> dict[str, Any]:
    """The values, with None instead of "none" in fields whose default is None."""
    off = {
        key
        for key, value in data.items()
        if isinstance(value, str) and value == "none" and key in cls.model_fields
    }
    off = {key for key in off if cls.model_fields[key].default is None}
    return {**data, **dict.fromkeys(off)}


def first_mistake(error: ValidationError, cls: type[BaseModel]) -> str:
    """One line about the first error that pydantic found in a spec."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else cls.__name__
    if first["type"] == "extra_forbidden":
        return f"unknown key {field!r}; {nearest_choice(field, list(cls.model_fields))}"
    stage = len(first["loc"]) > 1 and field not in NOT_STAGES
    place = f" (stage {int(first['loc'][1]) + 1})" if stage else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{field} = {first['input']!r}{place}: {message}"


class Strict(BaseModel):
    """Frozen, strict values; a wrong one raises a `SretError` of one line."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        ignored_types=(cached_property,),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise SretError(first_mistake(error, cls)) from None

    def with_values(self, **values: Any) -> Self:
        """A copy with other values, validated again."""
        return type(self)(**{**self.model_dump(), **values})
