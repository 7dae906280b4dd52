"""Labelled images by index: folders, `digits` and random images. Damaged images raise errors."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from sret_cli.data.class_names import DIGITS, ClassList, natural_key, order_classes
from sret_cli.data.decode import UNREADABLE, decode_image, is_image, unreadable_error
from sret_cli.data.folders import (
    class_folders,
    find_test,
    folder_classes,
    image_root,
    kaggle_labels,
)
from sret_cli.runtime.errors import DATA, SretError

SYNTHETIC_IMAGES = 10_240, 1_024  # for training and for test


class Images(Protocol):
    """The interface of a timm reader: images and classes by index, and the files of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """An open file, a Pillow image or an 8-bit array `[Y, X]` or `[Y, X, 3]`; and its class."""

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str | None:
        """The path of the image's file, if it has one."""


@dataclass(frozen=True)
class Source:
    """Labelled images by index, and the names of the classes.

    If the data have only numbers of classes, `named` is False and `classes` holds the numbers as
    text. `numbers`, if given, maps the numbers in the data to those of `classes`.
    """

    name: str
    images: Images
    classes: tuple[str, ...]
    named: bool = True
    numbers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int, mode: str) -> tuple[Image.Image, int]:
        """The decoded image of an index, and the number of its class.

        Raises:
            SretError: it cannot be decoded or has too many pixels; the message names it.
        """
        try:
            data, target = self.images[index]
            number = int(target)
            return decode_image(data, mode), self.numbers[number] if self.numbers else number
        except UNREADABLE as error:
            raise unreadable_error(self.filename(index), error) from None

    @property
    def class_list(self) -> ClassList:
        """The classes, to be compared with those of other data or of a model."""
        return ClassList(self.classes if self.named else None, f"the data {self.name}")

    def in_order(self, classes: tuple[str, ...]) -> "Source":
        """The same images with their classes numbered in another order of the same names."""
        names = [self.classes[n] for n in self.numbers] if self.numbers else self.classes
        places = {name: place for place, name in enumerate(classes)}
        return replace(self, classes=classes, numbers=tuple(places[name] for name in names))

    def filename(self, index: int) -> str:
        """The name of an image in messages."""
        name = self.images.filename(index, absolute=True) or f"image {index}"
        return name if name.startswith(self.name) else f"{self.name}, {name}"


@dataclass(frozen=True)
class Listed:
    """Paths of image files, or arrays, and their classes."""

    images: Sequence[str | np.ndarray]
    targets: Sequence[int]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return open(image, "rb") if isinstance(image, str) else image, self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str | None:
        """The path of a file; None for arrays."""
        image = self.images[index]
        return image if isinstance(image, str) else None


@dataclass(frozen=True)
class TorchvisionImages:
    """A torchvision dataset.

    torchvision has no common interface for the files, classes and pixels of a dataset: only the
    attributes that several of its classes use. `paths`, `targets` and `pixels` look for these.
    """

    dataset: Any

    @cached_property
    def paths(self) -> list[str]:
        """The file of each image; empty if the images are not single files."""
        if self._is_inaturalist:
            folders = self.dataset.all_categories
            return [
                os.path.join(self.dataset.root, folders[number], name)
                for number, name in self.dataset.index
            ]
        return [str(path) for path, *_ in getattr(self.dataset, "imgs", ())]  # as in ImageFolder

    @cached_property
    def targets(self) -> list[int] | None:
        """The class of each image, if it is known without opening the image."""
        for name in ("targets", "labels"):  # as in CIFAR10 and in SVHN
            if (values := getattr(self.dataset, name, None)) is not None:
                return [int(value) for value in values]
        if self._is_inaturalist:
            return [number for number, _ in self.dataset.index]
        return [target for _, target in getattr(self.dataset, "imgs", ())] or None

    @property
    def pixels(self) -> np.ndarray | None:
        """All images `[N, …]`, if the dataset holds them in memory."""
        data = getattr(self.dataset, "data", None)  # a tensor in MNIST, an array in CIFAR10
        if isinstance(data, Tensor):
            return data.numpy()
        return data if isinstance(data, np.ndarray) else None

    @property
    def _is_inaturalist(self) -> bool:
        return hasattr(self.dataset, "all_categories")  # whose `index` has categories and names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str | None:
        """None: not every torchvision dataset has a file for each image."""
        return None


@dataclass(frozen=True)
class Synthetic:
    """Random images and classes; each is drawn from the seed and its index when it is read."""

    count: int
    seed: int
    shape: tuple[int, ...]  # [Y, X], or [Y, X, 3] for colour images
    classes: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        generator = np.random.default_rng((self.seed, self.count, index))
        pixels = np.frombuffer(generator.bytes(int(np.prod(self.shape))), np.uint8)
        return pixels.reshape(self.shape), int(generator.integers(self.classes))

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str | None:
        """None: the images have no files."""
        return None


def synthetic(seed: int, img_size: int, channels: int, classes: int) -> tuple[Source, Source]:
    """Random images without augmentation: 10,240 for training and 1,024 for test."""
    shape = (img_size, img_size) if channels == 1 else (img_size, img_size, channels)
    train, test = (Synthetic(count, seed, shape, classes) for count in SYNTHETIC_IMAGES)
    names = tuple(map(str, range(classes)))
    return (
        Source("synthetic", train, names, named=False),
        Source("synthetic", test, names, named=False),
    )


def digits() -> tuple[Source, Source]:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8: 1,437 for training, 360 for test.

    Source: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(
        images, data.target, test_size=0.2, random_state=0, stratify=data.target
    )
    train, test, train_targets, test_targets = split
    return (
        Source("digits", Listed(list(train), train_targets.tolist()), DIGITS),
        Source("digits", Listed(list(test), test_targets.tolist()), DIGITS),
    )


def train_folder(data_dir: Path, classes: tuple[str, ...] | None = None) -> Source:
    """Images of `train/`, which has a folder for each class, sorted by class.

    `classes` gives the order of the classes if it is not that of `folder_classes`.

    Raises:
        SretError: the folder or a class has no images.
    """
    folder, classes = image_root(data_dir) / "train", classes or tuple(folder_classes(data_dir))
    source = _images(folder, classes)
    assert isinstance(source.images, Listed)
    empty = sorted(set(range(len(classes))) - set(source.images.targets))
    if empty:
        raise SretError(f"no images of class {classes[empty[0]]!r} in {folder}", DATA)
    return source


def test_folder(data_dir: Path, classes: tuple[str, ...] | None = None) -> Source:
    """Images of the first of `TEST_NAMES` that exists, which has a folder for each class.

    The classes are the folders of `train/`, or of the test images if there is no `train/`. A class
    may be missing or empty; the others keep their numbers. ImageNet from Kaggle is recognised by
    its `LOC_val_solution.csv`. `classes` is as in `train_folder`.

    Raises:
        SretError: the folder is missing, has no images, or has a class that `train/` does not have.
    """
    root = image_root(data_dir)
    test = find_test(root)
    if test is None:
        raise SretError(f"{root} has no test/ and no val/; put test images in one of them", DATA)
    trained: Sequence[str] | None = classes
    if trained is None and (root / "train").is_dir():
        trained = folder_classes(data_dir)
    flat = kaggle_labels(data_dir)
    if flat is not None and not class_folders(flat[0]):
        folder, labels = flat
        return _labelled(folder, labels, tuple(trained or order_classes(labels.values())))
    names = class_folders(test)
    others = [name for name in names if trained is not None and name not in set(trained)]
    if others:
        raise SretError(
            f"{test} has the class {others[0]!r}, which train/ does not have; add or remove it",
            DATA,
        )
    return _images(test, tuple(trained or names))


def _images(folder: Path, classes: tuple[str, ...]) -> Source:
    found = [(path, n) for n, name in enumerate(classes) for path in find_images(folder / name)]
    if not found:
        raise SretError(f"no images in {folder}; put them in one folder for each class", DATA)
    return _listed(folder, found, classes)


def _labelled(folder: Path, labels: dict[str, str], classes: tuple[str, ...]) -> Source:
    numbers = {name: number for number, name in enumerate(classes)}
    found = []
    for path in find_images(folder):
        label = labels.get(Path(path).stem)
        if label not in numbers:
            raise SretError(
                f"{path} has the class {label!r}, which is not a class of train/; add or remove it",
                DATA,
            )
        found.append((path, numbers[label]))
    return _listed(folder, found, classes)


def _listed(folder: Path, found: list[tuple[str, int]], classes: tuple[str, ...]) -> Source:
    images = Listed([path for path, _ in found], [target for _, target in found])
    return Source(str(folder), images, classes)


def find_images(folder: Path) -> list[str]:
    """The images in the folder of a class and in its subfolders, sorted; no hidden files."""
    return [path for path in find_files(folder) if is_image(path)]


def find_files(folder: Path) -> list[str]:
    """The paths of all files in the folder of a class and in its subfolders, sorted.

    Links to folders are followed, but no folder is read twice, nor one that contains the class.
    """
    above = {*Path(os.path.abspath(folder)).parents, *Path(os.path.realpath(folder)).parents}
    found, seen = [], set(map(os.path.realpath, above))
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(where, name)), name))
        found += [os.path.join(where, name) for name in sorted(files)]
    common = len(
        str(folder)
    )  # the common prefix does not change the order, and takes most of the time
    return sorted(found, key=lambda path: natural_key(path[common:]))
