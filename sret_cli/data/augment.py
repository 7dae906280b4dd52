"""How an image becomes a tensor: timm's transforms, random erasing, and their random draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torch.utils.data import get_worker_info

from sret_cli.runtime.errors import DATA, SretError
from sret_cli.spec.backbone import Spec
from sret_cli.spec.train import TrainSpec

DIGITS_MEAN, DIGITS_STD = 0.305, 0.376  # of all pixels, scaled to 0..1
MODES = {1: "L", 3: "RGB"}


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Posterizes as timm does; black if no bit is kept, which Pillow refuses since version 13."""
    kept = posterize(image, max(bits_to_keep, 1))
    return kept if bits_to_keep > 0 else kept.point(lambda level: 0)


NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize)


@dataclass(frozen=True)
class Pixels:
    """The images that a model takes, and the data's mean and deviation for pixels from 0 to 1."""

    channels: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, train: TrainSpec, model: Spec) -> Self:
        """The images of a run.

        Raises:
            SretError: the model's images have neither 1 nor 3 channels.
        """
        if model.in_chans not in MODES:
            raise SretError(f"in_chans = {model.in_chans}: images have 1 or 3 channels", DATA)
        are_digits = train.dataset == "digits"
        mean = (DIGITS_MEAN,) if are_digits else IMAGENET_DEFAULT_MEAN
        std = (DIGITS_STD,) if are_digits else IMAGENET_DEFAULT_STD
        return cls(
            channels=model.in_chans,
            img_size=model.img_size,
            mean=per_channel(mean, model.in_chans),
            std=per_channel(std, model.in_chans),
        )

    @property
    def mode(self) -> str:
        """Pillow's mode of such images."""
        return MODES[self.channels]

    def transform(self, train: TrainSpec, **augmentation: Any) -> Any:
        """The timm transform to 8-bit tensors `[C, Y, X]`, by default that of test images."""
        return create_transform(
            (self.channels, self.img_size, self.img_size),
            interpolation=train.interpolation,
            crop_pct=train.crop_pct,
            use_prefetcher=True,
            **augmentation,
        )

    def augmentation(self, train: TrainSpec) -> Any:
        """The timm transform of training images to 8-bit tensors `[C, Y, X]`.

        Raises:
            SretError: timm does not know this `auto_augment`.
        """
        try:
            transform = self.transform(
                train,
                is_training=True,
                scale=train.scale,
                hflip=train.hflip,
                color_jitter=train.color_jitter or None,
                auto_augment=train.auto_augment,
                mean=self.mean,  # RandAugment fills with it where an image was moved away
                std=self.std,
            )
        except (AssertionError, ValueError) as error:
            reason = str(error) or "timm does not know it"
            raise SretError(f"auto_augment = {train.auto_augment!r}: {reason}") from None
        if train.reprob:
            transform.transforms.append(Erasing(train.reprob, self.mean, self.std))
        return transform

    def sample_transform(self, train: TrainSpec, training: bool) -> "SampleTransform":
        """The transform of a run's training or test images.

        Raises:
            SretError: timm does not know this `auto_augment`.
        """
        steps = self.augmentation(train) if training else self.transform(train)
        if train.dataset == "synthetic":
            steps = MaybePILToTensor()  # augmentation would take longer than drawing the images
        return SampleTransform(steps, self.mode, train.seed if training else None)


@dataclass(frozen=True)
class SampleTransform:
    """A transform of images of one Pillow mode; a seed and the sample's key decide its draws.

    Without a seed, `steps` must draw nothing.
    """

    steps: Any
    mode: str
    seed: int | None

    def __call__(self, image: Image.Image, key: str) -> Tensor:
        """The image as an 8-bit tensor `[C, Y, X]`."""
        if self.seed is None:
            return self.steps(image)
        with temporarily_seeded(f"{self.seed} {key}"):
            return self.steps(image)


class Erasing:
    """timm's random erasing, mode "pixel", of 8-bit images `[C, Y, X]`.

    After normalisation the noise has mean 0 and deviation 1, apart from rounding to 8 bits and
    clipping. Erasing 8-bit images lets the sample's own seed draw the noise, before mixing.
    """

    def __init__(self, probability: float, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.erase = RandomErasing(probability, mode="pixel", device="cpu")
        self.mean, self.std = as_byte_values(mean), as_byte_values(std)

    def __call__(self, image: Tensor) -> Tensor:
        """The image, with a random rectangle erased at this probability."""
        noise = self.erase(torch.full(image.shape, torch.nan))
        erased = noise.mul(self.std).add(self.mean).round().clamp(0, 255)
        return torch.where(noise.isnan(), image, erased.nan_to_num().to(torch.uint8))


def as_byte_values(values: tuple[float, ...], device: torch.device | None = None) -> Tensor:
    """Values for pixels from 0 to 1, one a channel, for pixels from 0 to 255: `[C, 1, 1]`."""
    return torch.tensor(values, device=device).mul(255).view(-1, 1, 1)


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value a channel: the values themselves, or their mean if the numbers differ."""
    mean = sum(values) / len(values)
    return values if len(values) == channels else (mean,) * channels


@contextmanager
def temporarily_seeded(text: str) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators from a text, and restores them after."""
    kept = None
    if get_worker_info() is None:  # a worker draws nothing else, and reading the states takes 50 us
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(text)
    number = random.getrandbits(32)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        if kept is not None:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_rng_state(kept[2])
