"""How a model is trained: the spec of a training, and its rules."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sret_cli.runtime.errors import USAGE, SretError, nearest_choice
from sret_cli.spec.dataset import WITH_COLUMNS, has_label_columns, has_stored_images
from sret_cli.spec.recipes import RATES, RECIPES, UNLABELLED
from sret_cli.spec.strict import Count, Fraction, Rate, Strict, as_tuples, without_none

COMPILE_MODES = ("off", "on", "auto")


def check_compile_mode(mode: Any) -> Any:
    """The mode, if there is such a one.

    Raises:
        SretError: there is not.
    """
    if mode not in COMPILE_MODES:
        choice = nearest_choice(str(mode), list(COMPILE_MODES))
        raise SretError(f"unknown mode of compilation {mode!r}; {choice}", USAGE)
    return mode


DATASETS = ("digits", "synthetic", "folder", "tar", "hfds", "wds")
NAMED = ("hfds", "torch")  # with a name after a slash


def model_fields(recipe: str, name: str, backbone: bool) -> dict[str, Any]:
    """What a recipe says of the fields that are not given of a preset, or of a backbone of timm."""
    if recipe not in RATES:
        return {}
    fields: dict[str, Any] = {"drop_path_rate": RATES[recipe].drop_path_rate}
    if recipe == "sret" and not backbone:
        fields["drop_path_ramp"] = "per_block"
        if name.startswith("sret_s"):  # sret_s and its variants
            fields["drop_path_rate"] = 0.2
    return fields


class TrainSpec(Strict):
    """How a model is trained: data, optimiser and schedule, in timm's words.

    A `recipe` fills the fields that are not given, its `lr` in proportion to `batch_size`, which is
    the images of one optimiser step on all devices; `accumulation` has a step take them in so many
    parts. `recursions_range` has each step draw the recursions of all stages from a range, from the
    seed and the step alone. A `clip_grad`, `mixup`, `cutmix` or `model_ema_decay` of 0 is none, and
    a `layer_decay` of 1. Warm-up starts at `warmup_lr`, a hundredth of `lr` if None. The schedule
    steps at every update or, without `sched_on_updates`, at every epoch. With `model_ema_warmup`
    the decay of the averaged weights grows from 0 to `model_ema_decay`. `decay_epochs` is of the
    schedules `step`, `wsd` and `rsqrt`, `decay_milestones` of `multistep`, `decay_rate` of both,
    and it is the power of `poly`. `init` is a directory with weights to start from; with
    `reset_head` the head starts anew. `recompute` has the backward pass recompute each pass
    ("pass"), segments of so many passes (a number), or what takes least memory ("auto"); `compile`
    has each kind of pass compiled ("auto": where there is a compiler).
    A field that is None where it is not given takes "none" for that.
    The defaults train the preset `nano` on `digits`; on other images, `hflip` is 0.5 and `crop_pct`
    0.875 where they are not given. With a `data_dir` and no other word, the dataset is a folder of
    images. `label_column` names the column of `hfds` that has the classes, or of `wds` the files
    (`cls`) or the field of their files `.json`: numbers, or the names of classes as text.
    A `teacher` is a model of timm's, with the weights of a file `teacher_checkpoint` or those that
    timm downloads, or a directory of a trained model; `teacher_img_size` is what it was trained on
    where timm says otherwise. `soft_labels` is a directory that `sret distill-labels` wrote. With
    either, the loss is the cross-entropy of the teacher's and the student's probabilities at
    `distill_temperature`: the images' classes and `smoothing` play no part. Stored labels bring
    their crops and flips, and images are not augmented beside them.

    Raises:
        SretError: a value is of the wrong type or out of range, or the values do not fit together.
    """

    recipe: Literal["none", "sret", "deit", "finetune", "small"] = "none"
    """Published or own settings that fill the fields that are not given."""
    dataset: str = "digits"
    """digits, synthetic, folder, tar, wds, hfds, hfds/NAME or torch/NAME; `folder` where `data_dir`
    is given.
    """
    data_dir: str | None = None
    """Where the images are; not part of the run id, which depends on the images themselves."""
    label_column: str | None = None
    """Column of the classes, where a dataset has several or an unusual name."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 15
    """Epochs of training."""
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    """Images of one optimiser step, on all processes together."""
    accumulation: Count = 1
    """Equal parts that the images of a step are taken in."""
    opt: str = "adamw"
    """Optimiser, by timm's name."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Learning rate; that of a recipe is in proportion to `batch_size`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each block to the one before; 1 is none."""
    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "constant", "wsd", "rsqrt"] = (
        "cosine"
    )
    """Learning-rate schedule, by timm's name."""
    decay_epochs: Count = 30
    """Epochs between decays (`step`), or of the decay (`wsd`, `rsqrt`)."""
    decay_milestones: tuple[Count, ...] = (30, 60)
    """Epochs at which the rate decays (`multistep`)."""
    decay_rate: Annotated[float, Field(gt=0)] = 0.1
    """Factor of a decay (`step`, `multistep`); the power of `poly`."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate at the end of the schedule."""
    warmup_lr: Annotated[float, Field(ge=0)] | None = None
    """Learning rate at the first step of the warm-up."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs in which the learning rate rises."""
    sched_on_updates: bool = True
    """Whether the schedule steps at every update, or at every epoch."""
    smoothing: Rate = 0.1
    """Label smoothing."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Mixup alpha; 0 is none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """CutMix alpha; 0 is none."""
    model_ema_decay: Rate = 0.0
    """Decay of the averaged weights; 0 keeps none."""
    model_ema_warmup: bool = False
    """Whether the decay of the averaged weights rises from 0."""
    init: str | None = None
    """Directory with weights to start from."""
    reset_head: bool = False
    """Whether the head of `init` is left out, for other classes."""
    teacher: str | None = None
    """Name of a timm model, or directory of a trained model, to distil from."""
    teacher_checkpoint: str | None = None
    """File with the weights of a timm teacher."""
    teacher_img_size: Count | None = None
    """Image size of the teacher, where it is not timm's default."""
    soft_labels: str | None = None
    """Directory that `sret distill-labels` wrote."""
    distill_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the teacher's and the student's probabilities."""
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.5,
        1,
    )
    """Smallest and largest area of a random crop, as parts of the image."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How images are resized."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Side of the centre crop of test images, as a part of the resized image; 0.875 for
    photographs.
    """
    hflip: Fraction = 0.0
    """Probability of a horizontal flip; 0.5 for photographs."""
    color_jitter: Fraction = 0.0
    """Strength of the colour jitter."""
    auto_augment: str | None = None
    """timm's policy, such as `rand-m9-mstd0.5-inc1`; `none` switches a recipe's off."""
    reprob: Fraction = 0.0
    """Probability of random erasing."""
    aug_repeats: Annotated[int, Field(ge=0, le=100)] = 0
    """Times that an image is repeated within an epoch, each time augmented anew; 0 or 1 is once."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read does: `stop` the training, or `skip` the image and count
    it.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 by autocast."""
    recompute: Literal["none", "pass", "auto"] | Count = "none"
    """What the backward pass recomputes: nothing, each pass, segments of that many passes, or what
    needs least memory (`auto`).
    """
    compile: Literal["off", "on", "auto"] = "off"
    """Whether each kind of pass is compiled; `auto` where there is a compiler."""
    recursions_range: tuple[Count, Count] | None = None
    """Smallest and largest recursion count; each step draws one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed for weights, data order and augmentation."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = given = without_none(data, cls)
        if "dataset" not in data and data.get("data_dir") is not None:
            data = {"dataset": "folder", **data}
        if data.get("dataset", "digits") != "digits":
            data = {"hflip": 0.5, "crop_pct": 0.875, **data}
        name = data.get("recipe", "none")
        if not isinstance(name, str) or name not in RECIPES:
            raise SretError(f"unknown recipe {name!r}; {nearest_choice(str(name), list(RECIPES))}")
        unlabelled = UNLABELLED if data.get("soft_labels") is not None else {}
        given, data = data, {**RECIPES[name], **unlabelled, **data}
        if name in RATES and "lr" not in data and isinstance(data["batch_size"], int):
            data["lr"] = RATES[name].lr * data["batch_size"] / 512
        for rate in ("min_lr", "warmup_lr"):
            if rate in RECIPES[name] and rate not in given and isinstance(data.get("lr"), float):
                data[rate] = min(data[rate], data["lr"])
        return data | cls.fitted(given)

    @classmethod
    def fitted(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Fields that are not given and whose usual values do not fit those that are.

        A warm-up as long as the training is cut to its usual part of it, and a `min_lr` above the
        `lr` to that.
        """
        fields = ("epochs", "warmup_epochs", "min_lr")
        usual = {name: cls.model_fields[name].default for name in fields}
        usual |= RECIPES.get(given.get("recipe", "none"), {})
        fitted: dict[str, Any] = {}
        epochs, lr, warmup = given.get("epochs"), given.get("lr"), usual["warmup_epochs"]
        if "warmup_epochs" not in given and isinstance(epochs, int) and 0 < epochs <= warmup:
            fitted["warmup_epochs"] = warmup * epochs // usual["epochs"]
        if "min_lr" not in given and isinstance(lr, int | float) and 0 < lr < usual["min_lr"]:
            fitted["min_lr"] = lr
        return fitted

    @field_validator("scale", "recursions_range", "decay_milestones", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return as_tuples(value)

    @field_validator("data_dir", "init", "teacher", "teacher_checkpoint", "soft_labels")
    @classmethod
    def _one_spelling(cls, value: str | None) -> str | None:
        return None if value is None else os.path.normpath(os.path.expanduser(value))

    @field_validator("dataset", mode="before")
    @classmethod
    def _known_dataset(cls, value: Any) -> Any:
        value = value.rstrip("/") if isinstance(value, str) else value  # timm writes wds/
        kind, slash, _ = str(value).partition("/")
        if (kind if slash else value) not in (NAMED if slash else DATASETS):
            choices = [*DATASETS, *(f"{kind}/NAME" for kind in NAMED)]
            raise SretError(f"unknown dataset {value!r}; {nearest_choice(str(value), choices)}")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _known_mode(cls, value: Any) -> Any:
        return check_compile_mode(value)

    @field_validator("recompute", mode="before")
    @classmethod
    def _known_recompute(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value not in ("none", "pass", "auto") and not number:
            raise SretError(
                f"recompute = {value!r}: use none, pass, auto, or a number of passes, 1 or more"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        embedded = not has_stored_images(self.dataset)
        if self.data_dir is None and not embedded and not self.dataset.startswith("hfds/"):
            raise SretError(
                f"dataset = {self.dataset!r} needs a folder of images; name it with --data-dir"
            )
        if embedded and self.data_dir is not None:
            raise SretError(
                f"data_dir = {self.data_dir!r} is not used by dataset = {self.dataset!r}; "
                "use --dataset folder, or leave it out"
            )
        if self.label_column is not None and not has_label_columns(self.dataset):
            raise SretError(
                f"label_column = {self.label_column!r}: dataset = {self.dataset!r} has no columns "
                f"to choose from, but {' and '.join(WITH_COLUMNS)} have; leave it out"
            )
        if self.reset_head and self.init is None:
            raise SretError("reset_head = true needs weights to start from; name some as init")
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise SretError(
                f"{self.warmup_epochs} warm-up epochs leave nothing of {self.epochs} epochs; "
                "use fewer (--set train.warmup_epochs=0)"
            )
        if self.min_lr > self.lr:
            raise SretError(
                f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}; use a smaller one"
            )
        if self.warmup_lr is not None and self.warmup_lr > self.lr:
            raise SretError(
                f"warmup_lr = {self.warmup_lr:g}, where warm-up starts, is above lr = "
                f"{self.lr:g}; use a smaller one"
            )
        if self.model_ema_warmup and not self.model_ema_decay:
            raise SretError(
                "model_ema_warmup = true needs averaged weights; set model_ema_decay, e.g. 0.9999"
            )
        if self.batch_size % self.accumulation:
            raise SretError(
                f"batch_size = {self.batch_size} is not accumulation = {self.accumulation} equal "
                f"parts; use {self.accumulation * -(-self.batch_size // self.accumulation)}"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise SretError(
                f"batch_size = {self.batch_size} is odd, and mixup mixes pairs of images; use "
                f"{self.batch_size + 1}, or mixup = 0 and cutmix = 0"
            )
        if self.recursions_range and self.recursions_range[0] > self.recursions_range[1]:
            raise SretError(
                f"recursions_range = {self.recursions_range}: the smallest count comes first"
            )
        if self.scale[0] > self.scale[1]:
            raise SretError(f"scale = {self.scale}: the smallest crop comes first; swap the two")
        self._check_distillation()
        return self

    def _check_distillation(self) -> None:
        if self.teacher is not None and self.soft_labels is not None:
            raise SretError(
                f"teacher = {self.teacher!r} and soft_labels = {self.soft_labels!r}: labels have "
                "been stored so that no teacher is needed; leave one of the two out"
            )
        for name in ("teacher_checkpoint", "teacher_img_size"):
            if self.teacher is None and getattr(self, name) is not None:
                raise SretError(f"{name} = {getattr(self, name)!r} needs a teacher; name one")
        if self.teacher is None and self.soft_labels is None and self.distill_temperature != 1:
            raise SretError(
                f"distill_temperature = {self.distill_temperature:g} needs a teacher or "
                "soft_labels; name one"
            )
        for name in UNLABELLED if self.soft_labels is not None else ():
            if value := getattr(self, name):
                raise SretError(
                    f"{name} = {value!r} does not go with soft_labels, which are of crops and "
                    "flips alone; leave it out, or use a teacher"
                )


def read_train(values: dict[str, Any]) -> TrainSpec:
    """The spec that `model_dump` gave these values, be it before some of the fields were there.

    A recipe has filled its fields then; those of today that it had not stay at their defaults.
    """
    defaults = {name: field.default for name, field in TrainSpec.model_fields.items()}
    return TrainSpec(**{**defaults, **values})
