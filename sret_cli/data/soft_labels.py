"""Soft labels on disk: some crops of each image, and the teacher's answer for each crop.

A directory holds `labels.bin` and `labels.json`. `labels.bin` has records of one size, ordered by
crop and then by image, so that an epoch reads one part of the file. `labels.json` is written last;
it says how the labels were made and of which images, with the SHA-256 of the records. A record is
the box of a crop in pixels of the image, whether it is flipped, and the classes and probabilities
(fp16) of the teacher's best guesses. Source: Fast Knowledge Distillation: Shen and Xing, ECCV 2022,
arXiv 2112.01528.
"""

import random
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torchvision.transforms import functional

from sret_cli.data.augment import MODES, temporarily_seeded
from sret_cli.data.class_names import ClassList, match_classes
from sret_cli.data.folders import folder_classes
from sret_cli.data.sources import Source
from sret_cli.runtime.errors import CHECKPOINT, DATA, SretError
from sret_cli.runtime.files import read_json, sha256
from sret_cli.spec.backbone import Spec
from sret_cli.spec.strict import Count, Fraction, Strict, as_tuples
from sret_cli.spec.train import TrainSpec

LABELS_FILE, HEADER_FILE, PROGRESS_FILE = "labels.bin", "labels.json", "labels.part.json"
MAX_SIDE = MAX_CLASSES = 65_535  # boxes and classes are stored in 16 bits
RATIO = (3 / 4, 4 / 3)  # of the sides of a crop, as in timm's training transform


class LabelsSpec(Strict):
    """How soft labels were made and of which images, as in `labels.json`.

    `classes` are the names of the classes, in the order of the numbers in the labels, if known.

    Raises:
        SretError: a value is of the wrong type or out of range.
    """

    version: Literal[1] = 1
    teacher: str
    teacher_sha256: str | None = None
    teacher_img_size: Count
    distill_temperature: Annotated[float, Field(gt=0)]
    precision: Literal["fp32", "bf16"]
    images: Count
    images_sha256: str
    num_classes: Annotated[int, Field(ge=2, le=MAX_CLASSES)]
    classes: tuple[str, ...] | None = None
    in_chans: Count
    img_size: Count
    scale: tuple[float, float]
    hflip: Fraction
    interpolation: Literal["bilinear", "bicubic"]
    seed: Annotated[int, Field(ge=0)]
    crops: Count
    top_k: Count
    sha256: str = ""

    @field_validator("scale", "classes", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return as_tuples(value)

    @property
    def record(self) -> np.dtype:
        """The layout of a record, little-endian and without gaps."""
        best = (self.top_k,)
        return np.dtype(
            [
                ("box", "<u2", (4,)),
                ("flip", "u1"),
                ("classes", "<u2", best),
                ("probabilities", "<f2", best),
            ]
        )

    def size_bytes(self, images: int | None = None) -> int:
        """The size of the records for a number of images; by default for all images."""
        return (self.images if images is None else images) * self.crops * self.record.itemsize


class Crop(NamedTuple):
    """A part of an image, in pixels, flipped or not."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def cut(self, image: Image.Image, spec: LabelsSpec) -> Tensor:
        """The pixels `[C, Y, X]` in 8 bits, bitwise the same for teacher and student."""
        size, mode = (spec.img_size, spec.img_size), str_to_interp_mode(spec.interpolation)
        image = functional.resized_crop(image, *self[:4], size, mode)
        return functional.pil_to_tensor(functional.hflip(image) if self.flip else image)


def draw_crop(image: Image.Image, spec: LabelsSpec, index: int, number: int) -> Crop:
    """The crop with a number of an image, drawn by timm's rule from the seed."""
    with temporarily_seeded(f"{spec.seed} {index} crop {number}"):
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            image, spec.scale, RATIO
        )
        return Crop(top, left, height, width, random.random() < spec.hflip)


class StoredLabels:
    """The soft labels in a directory.

    Raises:
        SretError: the labels do not exist, are not finished, or are damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.spec = directory, read_labels_spec(directory)
        self.path = directory / LABELS_FILE
        size = self.path.stat().st_size if self.path.is_file() else 0
        wanted = self.spec.size_bytes()
        damage = f"has {size:,} bytes, not {wanted:,}" if size != wanted else ""
        if not damage and sha256(self.path) != self.spec.sha256:
            damage = "has another SHA-256 than labels.json says"
        if damage:
            raise SretError(
                f"{self.path} {damage}: it is damaged; remove {directory} and write it again",
                CHECKPOINT,
            )

    @cached_property
    def records(self) -> np.ndarray:
        """All records `[crops, images]`, mapped into memory on first use."""
        shape = (self.spec.crops, self.spec.images)
        return np.memmap(self.path, self.spec.record, "r", shape=shape)

    def refuse_other(self, train: TrainSpec, model: Spec, source: Source) -> None:
        """Raises if the labels do not belong to the images of a run.

        Raises:
            SretError: a value differs; the message names it.
        """
        ours = {f"model.{k}": getattr(model, k) for k in ("num_classes", "in_chans", "img_size")}
        names = ("scale", "hflip", "interpolation", "distill_temperature")
        ours |= {f"train.{name}": getattr(train, name) for name in names}
        for key, value in ours.items():
            stored = getattr(self.spec, key.partition(".")[2])
            if stored != value:
                raise SretError(
                    f"the labels in {self.directory} were made with {key} = {stored}, and the run "
                    f"has {value}; set {key} = {stored}, or write new labels with "
                    "`sret distill-labels`",
                    DATA,
                )
        if self.spec.classes is not None and source.named:
            stored_list = label_list(self.directory, self.spec.classes)
            if match_classes(source.class_list, stored_list) is not None:
                raise SretError(
                    f"the classes of {source.name} have another order than those of the labels in "
                    f"{self.directory}; {stored_list.remedy}",
                    DATA,
                )

    def sample(self, source: Source, index: int, number: int) -> tuple[Tensor, Tensor]:
        """The crop of an image with a number (modulo the number of crops), and its soft label.

        Returns:
            The pixels `[C, Y, X]`, 8 bits, and `[2, top_k]`: classes and their probabilities.

        Raises:
            SretError: the image cannot be decoded, or it has no such crop.
        """
        image, _ = source.open(index, MODES[self.spec.in_chans])
        record = self.records[number % self.spec.crops, index]
        top, left, height, width = map(int, record["box"])
        inside = top + height <= image.height and left + width <= image.width
        if not height or not width or not inside:
            raise SretError(
                f"{source.filename(index)} has no label in {self.directory}, or is another image "
                "than the teacher saw; write the labels again",
                DATA,
            )
        best = np.stack((record["classes"].astype(np.float32), record["probabilities"]))
        pixels = Crop(top, left, height, width, bool(record["flip"])).cut(image, self.spec)
        return pixels, torch.from_numpy(best)


def label_list(directory: Path, classes: tuple[str, ...]) -> ClassList:
    """The classes of the labels in a directory, for comparison with the classes of images."""
    return ClassList(
        classes, f"the labels in {directory}", "write labels of these with `sret distill-labels`"
    )


def stored_classes(directory: Path, train: TrainSpec) -> ClassList | None:
    """The classes of the labels in a directory, finished or not; None if they are not recorded.

    Labels of a folder without recorded names use the alphabetical order of an earlier version.
    """
    paths = [directory / name for name in (HEADER_FILE, PROGRESS_FILE)]
    path = next((path for path in paths if path.is_file()), None)
    found = read_json(path) if path is not None else None
    if path is not None and path.name == PROGRESS_FILE and isinstance(found, dict):
        found = found.get("labels")
    if not isinstance(found, dict):
        return None
    names = found.get("classes")
    if names is None and train.dataset == "folder":
        names = sorted(folder_classes(Path(train.data_dir or "")))
    return None if names is None else label_list(directory, tuple(map(str, names)))


def read_labels_spec(directory: Path) -> LabelsSpec:
    """How the labels in a directory were made.

    Raises:
        SretError: the labels do not exist, or their header cannot be read.
    """
    path = directory / HEADER_FILE
    if not path.is_file():
        started = (directory / LABELS_FILE).is_file()
        what = "are not finished: resume" if started else "do not exist: run"
        raise SretError(f"the labels in {directory} {what} `sret distill-labels`", DATA)
    try:
        return LabelsSpec(**read_json(path))
    except (SretError, TypeError) as error:
        raise SretError(
            f"{path} is damaged or of another version ({error}); write the labels again",
            CHECKPOINT,
        ) from None


def spread_probabilities(best: Tensor, num_classes: int) -> Tensor:
    """Probabilities of all classes `[B, num_classes]` from those of the best `[B, 2, top_k]`.

    The remaining probability is spread evenly over the other classes (marginal smoothing of Shen
    and Xing).
    """
    classes, top = best[:, 0].long(), best[:, 1]
    rest = (1 - top.sum(1, keepdim=True)).clamp(min=0) / max(num_classes - top.shape[1], 1)
    soft = rest.expand(-1, num_classes).scatter(1, classes, top)
    return soft / soft.sum(1, keepdim=True)  # fp16 may leave the best a little above one
