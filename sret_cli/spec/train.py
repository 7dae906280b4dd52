"""The spec of a training, and its rules."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sret_cli.runtime.errors import USAGE, SretError, nearest_choice
from sret_cli.spec.dataset import WITH_COLUMNS, has_label_columns, has_stored_images
from sret_cli.spec.recipes import RATES, RECIPES, UNLABELLED
from sret_cli.spec.strict import Count, Fraction, Rate, Strict, as_tuples, without_none

COMPILE_MODES = ("off", "on", "auto")


def check_compile_mode(mode: Any) -> Any:
    """The mode itself, if it exists.

    Raises:
        SretError: the mode is unknown.
    """
    if mode not in COMPILE_MODES:
        choice = nearest_choice(str(mode), list(COMPILE_MODES))
        raise SretError(f"unknown mode of compilation {mode!r}; {choice}", USAGE)
    return mode


DATASETS = ("digits", "synthetic", "folder", "tar", "hfds", "wds")
NAMED = ("hfds", "torch")  # these take a name after a slash


def model_fields(recipe: str, name: str, backbone: bool) -> dict[str, Any]:
    """The fields of a model that a recipe sets: a preset's, or a timm model's (`backbone`)."""
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

    The defaults train the preset `nano` on `digits`. A field whose default is None also takes
    "none".

    Raises:
        SretError: a value is of the wrong type or out of range, or the values do not fit together.

    Examples:
        >>> from sret_cli import TrainSpec
        >>> spec = TrainSpec(recipe="sret", data_dir="imagenet")
        >>> spec.dataset, spec.epochs, spec.batch_size, spec.lr
        ('folder', 300, 1024, 0.002)
    """

    recipe: Literal["none", "sret", "deit", "finetune", "small"] = "none"
    """Values for the fields that are not given: `sret` and `deit` as published, `finetune` as DeiT
    fine-tunes at a larger image size, `small` for images of 32 px, `none` for the defaults.
    All but `none` also set the drop path of the model, unless it is given.
    """
    dataset: str = "digits"
    """`digits` (scans in scikit-learn), `synthetic` (random images, to measure speed), `folder`
    (a folder of images for each class), `tar` (the same in tar files), `wds` (WebDataset shards),
    `hfds` (parquet files or images), `hfds/NAME` (a Hugging Face dataset) or `torch/NAME` (a
    torchvision dataset); `folder` if only `data_dir` is given.
    """
    data_dir: str | None = None
    """Directory of the images. The run id depends on the images, not on this path."""
    label_column: str | None = None
    """Column of `hfds` that holds the classes, if there are several; for `wds` the extension of the
    files with the classes (such as `cls`), or a field of the files `.json`.
    """
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 15
    """Number of epochs."""
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    """Images of one optimiser step, over all processes."""
    accumulation: Count = 1
    """Number of equal parts that a step processes one after the other, to save memory."""
    opt: str = "adamw"
    """Name of a timm optimiser, such as `adamw`."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Highest learning rate. A recipe's is multiplied by `batch_size` / 512."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of matrices; biases, norms and other vectors have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each block to the block before it; 1 is off."""
    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "constant", "wsd", "rsqrt"] = (
        "cosine"
    )
    """timm's learning-rate schedule after the warm-up. `cosine`, `tanh` and `poly` fall to
    `min_lr`, `step` and `multistep` multiply by `decay_rate` at certain epochs, `constant` stays at
    `lr`, `wsd` stays there and `rsqrt` falls slowly until both fall to `min_lr` at the end.
    """
    decay_epochs: Count = 30
    """`step`: epochs between two decays. `wsd`, `rsqrt`: epochs of the fall at the end."""
    decay_milestones: tuple[Count, ...] = (30, 60)
    """`multistep`: epochs at which the learning rate decays."""
    decay_rate: Annotated[float, Field(gt=0)] = 0.1
    """`step`, `multistep`: factor of each decay. `poly`: the power."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate at the end; `step`, `multistep` and `constant` do not use it."""
    warmup_lr: Annotated[float, Field(ge=0)] | None = None
    """Learning rate at the start of the warm-up; `lr` / 100 if not given."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs, of those in `epochs`, in which the learning rate rises linearly to `lr`."""
    sched_on_updates: bool = True
    """Whether the learning rate changes at every step, or only at every epoch."""
    smoothing: Rate = 0.1
    """Label smoothing; not used with `teacher` or `soft_labels`."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient, to which larger ones are scaled down; 0 is off."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of CutMix; 0 is off."""
    model_ema_decay: Rate = 0.0
    """Decay of the exponential average of the weights (EMA) at each step; 0 is off."""
    model_ema_warmup: bool = False
    """Whether that decay rises from 0 to `model_ema_decay`, by timm's formula."""
    init: str | None = None
    """Directory of a run or model with the weights to start from. Position embeddings are resampled
    to the image size; a head for another number of classes is not loaded.
    """
    reset_head: bool = False
    """Whether to start with a new head instead of that of `init`."""
    teacher: str | None = None
    """Name of a timm model, or directory of a trained model, to distil from. The loss is then the
    cross-entropy of the teacher's and the student's probabilities; labels are not used.
    """
    teacher_checkpoint: str | None = None
    """File with the weights of a timm teacher; if not given, timm downloads its own."""
    teacher_img_size: Count | None = None
    """Height and width of a timm teacher's images, in pixels; timm's default if not given."""
    soft_labels: str | None = None
    """Directory of teacher's probabilities that `sret distill-labels` wrote, used instead of a
    `teacher`. Crops and flips are the stored ones, and there is no other augmentation.
    """
    distill_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Number by which the teacher's and the student's logits are divided before the softmax."""
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.5,
        1,
    )
    """Smallest and largest area of a random crop of a training image, as fractions of the image."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of resized images, in training and in evaluation."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Side of the centre crop of a test image, as a fraction of the resized image; if not given,
    0.875 for datasets other than `digits`.
    """
    hflip: Fraction = 0.0
    """Probability of a horizontal flip; if not given, 0.5 for datasets other than `digits`."""
    color_jitter: Fraction = 0.0
    """Strength of colour jitter; 0 is off. timm does not apply it together with `auto_augment`."""
    auto_augment: str | None = None
    """timm's policy, such as `rand-m9-mstd0.5-inc1`; `none` switches off that of a recipe."""
    reprob: Fraction = 0.0
    """Probability of random erasing of a part of a training image."""
    aug_repeats: Annotated[int, Field(ge=0, le=100)] = 0
    """How often an epoch contains an image, each time with other augmentation. The epoch stays as
    long, so that 3 uses a third of the images; 0 and 1 are off.
    """
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What happens at an image that cannot be read: `stop` ends the training, `skip` leaves the
    image out and counts it.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    """Floating-point format of the computation: `fp32`, or `bf16` through torch's autocast."""
    recompute: Literal["none", "pass", "auto"] | Count = "none"
    """What the backward pass recomputes to save memory: `none`, each `pass`, segments of a number
    of passes, or `auto`: the plan that needs least memory, or with `--gpu-memory` the fastest that
    fits. In timm models every value but `none` recomputes each pass.
    """
    compile: Literal["off", "on", "auto"] = "off"
    """Whether passes are compiled: `off`, `on`, or `auto`, which trains uncompiled if the compiler
    is missing or fails.
    """
    recursions_range: tuple[Count, Count] | None = None
    """Smallest and largest number of recursions: each step draws one number for all stages, from
    the seed and the step. For SReTs only; evaluation uses the model's own number.
    """
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
        """Values for fields that are not given and whose defaults do not fit the values given.

        A default warm-up that would fill all epochs is shortened in proportion to the epochs. A
        default `min_lr` above `lr` becomes `lr`.
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
                f"teacher = {self.teacher!r} and soft_labels = {self.soft_labels!r}: soft labels "
                "are used instead of a teacher; leave one of the two out"
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
                    f"{name} = {value!r} cannot be used with soft_labels, which were stored for "
                    "images with crops and flips only; leave it out, or use a teacher"
                )


def read_train(values: dict[str, Any]) -> TrainSpec:
    """The spec whose `model_dump` gave these values, also if some fields were added later.

    The recipe has filled its fields already; fields that are missing get their defaults.
    """
    defaults = {name: field.default for name, field in TrainSpec.model_fields.items()}
    return TrainSpec(**{**defaults, **values})
