"""Teachers: frozen timm models or trained models, applied to the student's images."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_cli.data.augment import Pixels, per_channel
from sret_cli.data.class_names import ClassList, all_outputs, config_classes, match_classes
from sret_cli.model.backbone import build_backbone
from sret_cli.runtime.device import autocast
from sret_cli.runtime.errors import CHECKPOINT, SretError, first_line, show_note_once
from sret_cli.spec.backbone import BackboneSpec, Spec, read_spec
from sret_cli.spec.train import TrainSpec
from sret_cli.weights.match import load_state
from sret_cli.weights.origin import evaluation_spec
from sret_cli.weights.safe_read import read_weights
from sret_cli.weights.store import load_config, load_model


class Teacher:
    """A frozen model in eval mode, called on images that are normalised for the student.

    The images are normalised again and resized for the teacher, which runs in the precision of the
    run. With `classes`, the student's classes, the logits come in the order of these classes.

    Raises:
        SretError: it cannot be loaded, or has other classes or channels than the student.
    """

    def __init__(
        self,
        train: TrainSpec,
        student: Spec,
        device: torch.device,
        classes: ClassList | None = None,
    ) -> None:
        self.device, self.precision = device, train.precision
        model, theirs, taught = load_teacher(train, student, classes)
        order = None if classes is None else match_classes(classes, taught)
        self.order: Tensor | None = None
        if order is not None:
            self.order = torch.tensor(all_outputs(order, student.num_classes), device=device)
        self.model = model.to(device).eval().requires_grad_(False)
        self.img_size = theirs.img_size
        ours = Pixels.of(train, student)
        values = (ours.mean, ours.std, theirs.mean, theirs.std)
        mean, std, other_mean, other_std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1) for v in values
        )
        self.factor, self.shift = std / other_std, (mean - other_mean) / other_std

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The float32 logits `[B, classes]` of images that are normalised for the student."""
        x = x * self.factor + self.shift
        if x.shape[-1] != self.img_size:
            size = (self.img_size, self.img_size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        with autocast(self.device, self.precision):
            logits = self.model(x).float()
        return logits if self.order is None else logits.index_select(1, self.order)


def load_teacher(
    train: TrainSpec, student: Spec, classes: ClassList | None = None
) -> tuple[nn.Module, Pixels, ClassList]:
    """The teacher of a training on the CPU, the pixels that it takes, and its classes.

    Raises:
        SretError: as `Teacher`.
    """
    assert train.teacher is not None
    directory = Path(train.teacher)
    if not directory.is_dir():
        return _timm_teacher(train, student, classes)
    for name in ("teacher_checkpoint", "teacher_img_size"):
        if (value := getattr(train, name)) is not None:
            raise SretError(
                f"{name} = {value!r} is for timm models, and {directory} is a directory of a "
                f"model; leave {name} out"
            )
    config = load_config(directory)
    spec = read_spec(config["model"])
    _refuse_other(train.teacher, channels=spec.in_chans, classes=spec.num_classes, student=student)
    how = evaluation_spec(config) or TrainSpec(data_dir=".")  # else prepared as ImageNet's images
    pixels = Pixels.of(how, spec)
    return load_model(directory), pixels, _taught(train, config_classes(config))


def _taught(train: TrainSpec, names: tuple[str, ...] | None) -> ClassList:
    """The classes of the teacher, to compare with those of the images."""
    remedy = "use a teacher that was trained on these classes"
    return ClassList(names, f"the teacher {train.teacher}", remedy)


def _imagenet_names(config: Any, classes: ClassList | None) -> tuple[str, ...] | None:
    """The names of the classes of weights that timm trained on ImageNet, in their order.

    The names are those of WordNet (`n01440764`). None if the images' classes have other names.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": config.num_classes})
    if subset is None or classes is None or classes.names is None:
        return None
    names = tuple(ImageNetInfo(subset).label_names())
    return names if set(names) & set(classes.names) else None


def _timm_teacher(
    train: TrainSpec, student: Spec, classes: ClassList | None
) -> tuple[nn.Module, Pixels, ClassList]:
    import timm

    assert train.teacher is not None
    model: Any
    name, channels, checkpoint = train.teacher, student.in_chans, train.teacher_checkpoint
    try:
        spec = BackboneSpec(
            backbone=name,
            img_size=train.teacher_img_size,  # type: ignore[arg-type]  # None: the model's own
            in_chans=channels,
            num_classes=student.num_classes,
        )
    except SretError as error:
        raise SretError(f"teacher: there is no directory {name}, and {error}") from None
    names = None
    if checkpoint is None:
        model = _pretrained(train, student)
        names = _imagenet_names(timm.get_pretrained_cfg(name), classes)
    else:
        model = build_backbone(spec)
        own = {key.partition(".")[0] for key in model.state_dict()}
        weights = read_weights(Path(checkpoint), own)
        for text in weights.notes:
            show_note_once(f"teacher: {text}")
        tensors = weights.tensors
        stem, head = (tensors.get(f"{layer}.weight") for layer in _ends(model.pretrained_cfg))
        if stem is not None and head is not None and stem.ndim > 1:
            _refuse_other(
                checkpoint, channels=stem.shape[1], classes=head.shape[0], student=student
            )
        load_state(model, tensors, checkpoint)
    mean, std = (tuple(model.pretrained_cfg[k]) for k in ("mean", "std"))
    mean, std = per_channel(mean, channels), per_channel(std, channels)
    pixels = Pixels(channels=channels, img_size=spec.img_size, mean=mean, std=std)
    return model, pixels, _taught(train, names)


def _ends(config: dict[str, Any]) -> tuple[str, str]:
    """The names of the first convolution and of the classifier, from the timm config of a model."""
    names = [config.get(key) or "" for key in ("first_conv", "classifier")]
    first, last = (name if isinstance(name, str) else name[0] for name in names)
    return first, last


def _pretrained(train: TrainSpec, student: Spec) -> nn.Module:
    """A timm model with the pretrained weights of timm, from its cache or the network."""
    import timm

    name = str(train.teacher)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise SretError(
            f"timm has no weights for the teacher {name}; give a file of weights as "
            "train.teacher_checkpoint"
        )
    _refuse_other(name, channels=config.input_size[0], classes=config.num_classes, student=student)
    sized = {} if train.teacher_img_size is None else {"img_size": train.teacher_img_size}
    try:
        try:
            return timm.create_model(name, pretrained=True, **sized)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return timm.create_model(name, pretrained=True)  # takes images of any size
    except (OSError, RuntimeError, ValueError) as error:
        raise SretError(
            f"the weights of the teacher {name} are not on this machine and cannot be downloaded "
            f"({first_line(error)}); give a file of weights as train.teacher_checkpoint",
            CHECKPOINT,
        ) from None


def _refuse_other(name: str, channels: int, classes: int, student: Spec) -> None:
    """Raises if a teacher has other classes or channels than the student."""
    if (channels, classes) != (student.in_chans, student.num_classes):
        raise SretError(
            f"the teacher {name} has {classes:,} classes and {channels} channels, but the model "
            f"has {student.num_classes:,} and {student.in_chans}; use a teacher that was trained "
            "on these classes"
        )
