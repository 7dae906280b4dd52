"""Datasets by name, to loaders whose every sample is a function of (seed, epoch, index).

Neither the order of the samples nor their augmentation depends on the number of workers. Images are
found and transformed by timm.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sret_cli.backbone import Spec
from sret_cli.errors import DATA, SretError
from sret_cli.recipe import TrainSpec
from sret_cli.study import DIGITS_CLASSES, class_folders, folder_classes

DIGITS_MEAN, DIGITS_STD = 0.305, 0.376  # of all pixels, scaled to 0..1
MODES = {1: "L", 3: "RGB"}

Key = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class Source:
    """Labelled images, by index: files, or 8-bit arrays of shape `[Y, X]`."""

    images: list[Path] | list[np.ndarray]
    targets: list[int]

    def open(self, index: int, mode: str) -> Image.Image:
        """The image of that index, decoded.

        Raises:
            SretError: it cannot be decoded; the message names its file.
        """
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return Image.fromarray(image).convert(mode)
        try:
            with Image.open(image) as file:
                return eight_bits(file).convert(mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
            raise SretError(f"cannot read {image}: {reason}; mend or remove it", DATA) from None


def eight_bits(image: Image.Image) -> Image.Image:
    """An image with 16 bits a pixel scaled to 8, where Pillow would clip; others as they are.

    Raises:
        ValueError: its pixels have no known range.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    return Image.fromarray((pixels // 257).astype(np.uint8))


class Samples(Dataset):
    """Transformed images and targets; a key is an epoch and an index."""

    def __init__(self, source: Source, transform: Any, mode: str, seed: int | None) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.seed = seed  # None: the transform draws nothing

    def __len__(self) -> int:
        return len(self.source.targets)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | SretError:
        """A sample, or the error of its image: a worker's exceptions would lose their type."""
        epoch, index = key
        try:
            image = self.source.open(index, self.mode)
        except SretError as error:
            return error
        if self.seed is None:
            return self.transform(image), self.source.targets[index]
        with seeded(f"{self.seed} {epoch} {index}"):
            return self.transform(image), self.source.targets[index]


class Batches(Sampler[list[Key]]):
    """Batches of keys of one epoch: in an order that seed and epoch determine, or as they are."""

    def __init__(self, samples: int, batch_size: int, seed: int | None) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        whole = self.samples // self.batch_size
        return max(whole, 1) if self.seed is not None else -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.seed is None:
            order = list(range(self.samples))
        else:
            order = (
                np.random.default_rng((self.seed, self.epoch)).permutation(self.samples).tolist()
            )
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


class Loader:
    """Batches of `images [B, C, Y, X]` and `targets [B]`.

    A random loader drops the last batch where it is not full; one in order keeps it.
    """

    def __init__(self, samples: Samples, batch_size: int, shuffle: bool, workers: int) -> None:
        self.samples = samples
        self.batches = Batches(len(samples), batch_size, samples.seed if shuffle else None)
        self.loader: DataLoader = DataLoader(
            samples,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every epoch draws from the model's
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch.

        Raises:
            SretError: an image cannot be decoded.
        """
        self.batches.epoch = epoch
        for batch in self.loader:
            if isinstance(batch, SretError):
                # Raising `batch` itself would tie a knot of it, its traceback and the loader, which
                # then could not end its workers before it has waited 10 seconds for them.
                raise SretError(str(batch), batch.code)
            yield batch


def collate(samples: list[tuple[Tensor, int] | SretError]) -> tuple[Tensor, Tensor] | SretError:
    """Stacks samples, or hands on the first error among them."""
    good = []
    for sample in samples:
        if isinstance(sample, SretError):
            return sample
        good.append(sample)
    return torch.stack([image for image, _ in good]), torch.tensor([target for _, target in good])


def load_data(train: TrainSpec, model: Spec, workers: int = 0) -> tuple[Loader, Loader]:
    """The loaders of a run's training and test images.

    Raises:
        SretError: a folder is missing or has no images, or the model takes no images of this kind.
    """
    transform, mode = _transform(train, model)
    digital = train.dataset == "digits"
    sources = digits() if digital else image_folder(Path(train.data_dir or ""))
    try:
        augment = transform(
            is_training=True,
            scale=train.scale,
            hflip=train.hflip,
            color_jitter=train.color_jitter or None,
            auto_augment=train.auto_augment,
        )
    except (AssertionError, ValueError) as error:
        reason = str(error) or "timm does not know it"
        raise SretError(f"auto_augment = {train.auto_augment!r}: {reason}") from None
    plain = transform(is_training=False, crop_pct=train.crop_pct)
    return (
        Loader(Samples(sources[0], augment, mode, train.seed), train.batch_size, True, workers),
        Loader(Samples(sources[1], plain, mode, None), train.batch_size, False, workers),
    )


def load_test_data(
    train: TrainSpec, model: Spec, workers: int = 0
) -> tuple[Loader, tuple[str, ...]]:
    """The loader of a run's test images alone, and the names of the classes, in their order.

    Raises:
        SretError: as `load_data`; a folder needs no `train/`.
    """
    transform, mode = _transform(train, model)
    if train.dataset == "digits":
        source, classes = digits()[1], tuple(map(str, range(DIGITS_CLASSES)))
    else:
        source, classes = test_folder(Path(train.data_dir or ""))
    samples = Samples(source, transform(is_training=False, crop_pct=train.crop_pct), mode, None)
    return Loader(samples, train.batch_size, False, workers), classes


def _transform(train: TrainSpec, model: Spec) -> tuple[partial, str]:
    """The transform by timm, to which `is_training` is still to be given, and PIL's mode."""
    if model.in_chans not in MODES:
        raise SretError(f"in_chans = {model.in_chans}: images have 1 or 3 channels", DATA)
    digital = train.dataset == "digits"
    mean = (DIGITS_MEAN,) if digital else IMAGENET_DEFAULT_MEAN
    std = (DIGITS_STD,) if digital else IMAGENET_DEFAULT_STD
    transform = partial(
        create_transform,
        (model.in_chans, model.img_size, model.img_size),
        interpolation=train.interpolation,
        mean=_per_channel(mean, model.in_chans),
        std=_per_channel(std, model.in_chans),
    )
    return transform, MODES[model.in_chans]


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    mean = sum(values) / len(values)
    return values if len(values) == channels else (mean,) * channels


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
    return Source(list(train), train_targets.tolist()), Source(list(test), test_targets.tolist())


def image_folder(data_dir: Path) -> tuple[Source, Source]:
    """Images of `train/` and of `test/`, `val/` or `validation/`, one folder a class.

    Raises:
        SretError: a folder or a class has no images, or the test images have other classes.
    """
    folder_classes(data_dir)  # train/ is there
    test, classes = test_folder(data_dir)
    train = _images(data_dir / "train", classes)
    empty = sorted(set(range(len(classes))) - set(train.targets))
    if empty:
        raise SretError(f"no images of class {classes[empty[0]]!r} in {data_dir / 'train'}", DATA)
    return train, test


def test_folder(data_dir: Path) -> tuple[Source, tuple[str, ...]]:
    """Images of `test/`, `val/` or `validation/`, one folder a class, and the class names, sorted.

    The classes are the folders of `train/` where there is one, else those of the test images. A
    folder may be empty: so a part of the classes keeps its numbers.

    Raises:
        SretError: the folder is missing or has no images, or a class that `train/` has not.
    """
    if not data_dir.is_dir():
        raise SretError(f"no folder {data_dir}; --data-dir names one with test/ or val/", DATA)
    tests = [data_dir / name for name in ("test", "val", "validation")]
    test = next((folder for folder in tests if folder.is_dir()), None)
    if test is None:
        raise SretError(f"{data_dir} has no test/ and no val/; put images to test on in one", DATA)
    classes = class_folders(test)
    if (data_dir / "train").is_dir():
        tested, classes = classes, folder_classes(data_dir)
        others = [name for name in tested if name not in set(classes)]
        if others:
            raise SretError(
                f"{test} has the class {others[0]!r}, which train/ has not; add it", DATA
            )
    return _images(test, tuple(classes)), tuple(classes)


def _images(folder: Path, classes: tuple[str, ...]) -> Source:
    found = [(path, n) for n, name in enumerate(classes) for path in find_images(folder / name)]
    if not found:
        raise SretError(f"no images in {folder}; put them in one folder a class", DATA)
    return Source([path for path, _ in found], [target for _, target in found])


def find_images(folder: Path) -> list[Path]:
    """The images in a class's folder and the folders in it, in their order; no hidden files."""
    found, _ = find_images_and_targets(str(folder))
    return [Path(path) for path, _ in found if not Path(path).name.startswith(".")]


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators by a text, and puts them back after."""
    number = random.Random(text).getrandbits(32)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
