"""Datasets by name, to loaders whose every sample is a function of (seed, epoch, index).

Neither the order of the samples nor their augmentation depends on the number of workers. Images are
found and transformed by timm.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sret_cli.augment import Pixels, seeded
from sret_cli.backbone import Spec
from sret_cli.errors import DATA, SretError, note
from sret_cli.recipe import TrainSpec
from sret_cli.study import DIGITS_CLASSES, class_folders, folder_classes

Key = tuple[int, int, int]  # epoch, index, which repeat of the image in the epoch


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
    """Transformed images of 8 bits `[C, Y, X]`, and targets."""

    def __init__(self, source: Source, transform: Any, mode: str, seed: int | None) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.seed = seed  # None: the transform draws nothing

    def __len__(self) -> int:
        return len(self.source.targets)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | SretError:
        """A sample, or the error of its image: a worker's exceptions would lose their type."""
        epoch, index, repeat = key
        try:
            image = self.source.open(index, self.mode)
        except SretError as error:
            return error
        if self.seed is None:
            return self.transform(image), self.source.targets[index]
        with seeded(f"{self.seed} {epoch} {index} {repeat}"):
            return self.transform(image), self.source.targets[index]


class Batches(Sampler[list[Key]]):
    """One rank's keys of the batches of an epoch, from batch `start` on.

    With a seed, the order is drawn from seed and epoch, each rank takes its contiguous share of a
    batch, and a last batch that is not full is dropped, unless it is the only one. Images that are
    repeated follow on each other, and the epoch is as long, as in timm's `RepeatAugSampler`.
    Without a seed, samples come in their order, and each rank takes every `world_size`-th.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int | None,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples, self.batch_size, self.seed, self.repeats = samples, batch_size, seed, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.rank, self.samples, self.world_size)) // self._share)
        return max(self.samples // self.batch_size, 1)

    @property
    def _share(self) -> int:
        return max(self.batch_size // self.world_size, 1)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.seed is None:
            own = range(self.rank, self.samples, self.world_size)
            for first in range(self.start * self._share, len(own), self._share):
                yield [(self.epoch, index, 0) for index in own[first : first + self._share]]
            return
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        for first in range(self.start * self.batch_size, self.samples, self.batch_size):
            places = range(first, min(first + self.batch_size, self.samples))
            if first and len(places) < self.batch_size:
                return
            ends = [len(places) * rank // self.world_size for rank in (self.rank, self.rank + 1)]
            yield [
                (self.epoch, int(order[place // self.repeats]), place % self.repeats)
                for place in places[ends[0] : ends[1]]
            ]


class Loader:
    """Batches of 8-bit `images [B, C, Y, X]` and `targets [B]`, one rank's share of each.

    `bad_images` says what is wrong with each image that was left out so far.
    """

    def __init__(
        self,
        samples: Samples,
        batches: Batches,
        workers: int,
        pixels: Pixels,
        on_bad_image: str = "stop",
    ) -> None:
        self.samples, self.batches, self.on_bad_image = samples, batches, on_bad_image
        self.mean, self.std = (
            torch.tensor(values).mul(255).view(1, -1, 1, 1) for values in (pixels.mean, pixels.std)
        )
        self.bad_images: list[str] = []
        self.loader: DataLoader = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every epoch draws from the model's
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on; those before are not decoded.

        Raises:
            SretError: an image cannot be decoded; where they are to be skipped, none of a batch.
        """
        self.batches.epoch, self.batches.start = epoch, start
        for images, targets, errors in self.loader:
            if errors and (self.on_bad_image == "stop" or not len(targets)):
                # Raising the error itself would tie a knot of it, its traceback and the loader, who
                # then could not end its workers before it has waited 10 seconds for them.
                raise SretError(str(errors[0]), errors[0].code)
            for text in map(str, errors):
                if text not in self.bad_images:
                    self.bad_images.append(text)
                    note(f"{text}; it is left out")
            yield images, targets

    def normalize(self, x: Tensor) -> Tensor:
        """Images of 8 bits as float32, less the data's mean and over its deviation."""
        if self.mean.device != x.device:
            self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        return x.float().sub_(self.mean).div_(self.std)


def collate(
    samples: list[tuple[Tensor, int] | SretError],
) -> tuple[Tensor, Tensor, list[SretError]]:
    """Stacks the samples that are good, beside the errors of the others."""
    errors = [sample for sample in samples if isinstance(sample, SretError)]
    good = [sample for sample in samples if not isinstance(sample, SretError)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([target for _, target in good]), errors


def load_data(
    train: TrainSpec, model: Spec, workers: int = 0, rank: int = 0, world_size: int = 1
) -> tuple[Loader, Loader]:
    """The loaders of a run's training and test images: one rank's share of them.

    Raises:
        SretError: a folder is missing or has no images, the model takes no images of this kind, or
            the batches do not divide among the ranks.
    """
    if train.batch_size % world_size:
        above = train.batch_size + world_size - train.batch_size % world_size
        raise SretError(
            f"batch_size = {train.batch_size} does not divide among {world_size} processes; "
            f"use {above}"
        )
    pixels = Pixels.of(train, model)
    digital = train.dataset == "digits"
    sources = digits() if digital else image_folder(Path(train.data_dir or ""))
    samples = Samples(sources[0], pixels.augmentation(train), pixels.mode, train.seed)
    batches = Batches(
        *(len(samples), train.batch_size, train.seed),
        *(max(train.aug_repeats, 1), rank, world_size),
    )
    loader = Loader(samples, batches, workers, pixels, train.on_bad_image)
    return loader, _test_loader(train, sources[1], pixels, workers, rank, world_size)


def load_test_data(
    train: TrainSpec, model: Spec, workers: int = 0, rank: int = 0, world_size: int = 1
) -> tuple[Loader, tuple[str, ...]]:
    """The loader of a run's test images alone, and the names of the classes, in their order.

    Raises:
        SretError: as `load_data`; a folder needs no `train/`.
    """
    pixels = Pixels.of(train, model)
    if train.dataset == "digits":
        source, classes = digits()[1], tuple(map(str, range(DIGITS_CLASSES)))
    else:
        source, classes = test_folder(Path(train.data_dir or ""))
    return _test_loader(train, source, pixels, workers, rank, world_size), classes


def _test_loader(
    train: TrainSpec, source: Source, pixels: Pixels, workers: int, rank: int, world_size: int
) -> Loader:
    samples = Samples(source, pixels.transform(train), pixels.mode, None)
    batches = Batches(len(samples), train.batch_size, None, 1, rank, world_size)
    return Loader(samples, batches, workers, pixels, train.on_bad_image)


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
