"""How a model is trained: the spec of a training, and its rules."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sret_cli.errors import SretError, nearest
from sret_cli.strict import Count, Rate, Share, Strict, as_tuples

DATASETS = ("digits", "synthetic", "folder", "tar", "hfds", "wds")
NAMED = ("hfds", "torch")  # with a name after a slash


class TrainSpec(Strict):
    """How a model is trained: data, optimiser and schedule, in timm's words.

    `recursions_range` has each step draw the recursions of all stages from a range, from the seed
    and the step alone; a `clip_grad` of 0 is none. The defaults train the preset `nano` on
    `digits`; on other images, `hflip` is 0.5 and `crop_pct` 0.875 where they are not given. With a
    `data_dir` and no other word, the dataset is a folder of images.

    Raises:
        SretError: a value is of the wrong type or out of range, or the values do not fit together.
    """

    dataset: str = "digits"
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
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.5,
        1,
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    hflip: Share = 0.0
    color_jitter: Share = 0.0
    auto_augment: str | None = None
    reprob: Share = 0.0
    aug_repeats: Annotated[int, Field(ge=0, le=100)] = 0
    on_bad_image: Literal["stop", "skip"] = "stop"
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "pass"] = "none"
    recursions_range: tuple[Count, Count] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_dataset(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if "dataset" not in data and data.get("data_dir") is not None:
                data = {"dataset": "folder", **data}
            if data.get("dataset", "digits") != "digits":
                data = {"hflip": 0.5, "crop_pct": 0.875, **data}
        return data

    @field_validator("scale", "recursions_range", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return as_tuples(value)

    @field_validator("data_dir")
    @classmethod
    def _one_spelling(cls, value: str | None) -> str | None:
        return None if value is None else os.path.normpath(value)

    @field_validator("dataset", mode="before")
    @classmethod
    def _known_dataset(cls, value: Any) -> Any:
        value = value.rstrip("/") if isinstance(value, str) else value  # timm writes wds/
        kind, slash, _ = str(value).partition("/")
        if (kind if slash else value) not in (NAMED if slash else DATASETS):
            choices = [*DATASETS, *(f"{kind}/NAME" for kind in NAMED)]
            raise SretError(f"unknown dataset {value!r}; {nearest(str(value), choices)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        embedded = self.dataset in ("digits", "synthetic")
        if self.data_dir is None and not embedded and not self.dataset.startswith("hfds/"):
            raise SretError(
                f"dataset = {self.dataset!r} needs a folder of images; name it with --data-dir"
            )
        if embedded and self.data_dir is not None:
            raise SretError(
                f"data_dir = {self.data_dir!r} is not used by dataset = {self.dataset!r}; "
                "use --dataset folder, or leave it out"
            )
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise SretError(
                f"{self.warmup_epochs} warm-up epochs leave nothing of {self.epochs} epochs; "
                "use fewer (--set train.warmup_epochs=0)"
            )
        if self.min_lr > self.lr:
            raise SretError(
                f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}; use a smaller one"
            )
        if self.recursions_range and self.recursions_range[0] > self.recursions_range[1]:
            raise SretError(
                f"recursions_range = {self.recursions_range}: the smallest count comes first"
            )
        if self.scale[0] > self.scale[1]:
            raise SretError(f"scale = {self.scale}: the smallest crop comes first; swap the two")
        return self
