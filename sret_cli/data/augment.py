"""How an image becomes a tensor: timm's transforms, random erasing, and what draws for them."""

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
from torch import Tensor
from torch.utils.data import get_worker_info

from sret_cli.runtime.errors import DATA, SretError
from sret_cli.spec.backbone import Spec
from sret_cli.spec.train import TrainSpec

DIGITS_MEAN, DIGITS_STD = 0.305, 0.376  # of all pixels, scaled to 0..1
MODES = {1: "L", 3: "RGB"}


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Timm's, and black where no bit is kept: that Pillow refuses since version 13."""
    kept = posterize(image, max(bits_to_keep, 1))
    return kept if bits_to_keep > 0 else kept.point(lambda level: 0)


NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize)


@dataclass(frozen=True)
class Pixels:
    """The images that a model takes, and the mean and deviation of the data's, scaled to 0..1."""

    channels: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, train: TrainSpec, model: Spec) -> Self:
        """Those of a run.

        Raises:
            SretError: the model's images have neither 1 nor 3 channels.
        """
        if model.in_chans not in MODES:
            raise SretError(f"in_chans = {model.in_chans}: images have 1 or 3 channels", DATA)
        digital = train.dataset == "digits"
        mean = (DIGITS_MEAN,) if digital else IMAGENET_DEFAULT_MEAN
        std = (DIGITS_STD,) if digital else IMAGENET_DEFAULT_STD
        channels = model.in_chans
        return cls(
            channels, model.img_size, per_channel(mean, channels), per_channel(std, channels)
        )

    @property
    def mode(self) -> str:
        """Pillow's name of such images."""
        return MODES[self.channels]

    def transform(self, train: TrainSpec, **augmentation: Any) -> Any:
        """Timm's transform to 8-bit tensors `[C, Y, X]`: of test images, unless more is given."""
        return create_transform(
            (self.channels, self.img_size, self.img_size),
            interpolation=train.interpolation,
            crop_pct=train.crop_pct,
            use_prefetcher=True,
            **augmentation,
        )

    def augmentation(self, train: TrainSpec) -> Any:
        """Timm's transform of training images to 8-bit tensors `[C, Y, X]`.

        Raises:
            SretError: timm does not know the automatic augmentation.
        """
        try:
            transform = self.transform(
                train,
                is_training=True,
                scale=train.scale,
                hflip=train.hflip,
                color_jitter=train.color_jitter or None,
                auto_augment=train.auto_augment,
                mean=self.mean,  # fills what RandAugment moves in from outside
                std=self.std,
            )
        except (AssertionError, ValueError) as error:
            reason = str(error) or "timm does not know it"
            raise SretError(f"auto_augment = {train.auto_augment!r}: {reason}") from None
        if train.reprob:
            transform.transforms.append(Erasing(train.reprob, self.mean, self.std))
        return transform


class Erasing:
    """timm's random erasing, mode "pixel", of 8-bit images `[C, Y, X]`.

    The noise has mean 0 and deviation 1 once the image is normalised, but for rounding to eight
    bits and for what a pixel cannot hold: so it is drawn with the sample, and mixing comes after.
    """

    def __init__(self, probability: float, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.erase = RandomErasing(probability, mode="pixel", device="cpu")
        self.mean, self.std = (torch.tensor(v).mul(255).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        """The image, erased or not."""
        noise = self.erase(torch.full(image.shape, torch.nan))
        erased = noise.mul(self.std).add(self.mean).round().clamp(0, 255)
        return torch.where(noise.isnan(), image, erased.nan_to_num().to(torch.uint8))


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """The values, or where there are not as many channels their mean for each."""
    mean = sum(values) / len(values)
    return values if len(values) == channels else (mean,) * channels


@contextmanager
def temporarily_seeded(text: str) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators by a text, and puts them back after."""
    kept = None
    if get_worker_info() is None:  # in a worker nothing else draws, and NumPy's state takes 50 us
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
