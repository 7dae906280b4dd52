"""Samples by index: images as 8-bit tensors and their targets, and how they become a batch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sret_cli.data.augment import SampleTransform
from sret_cli.data.image_notes import Noted, noted, without_notes
from sret_cli.data.order import Key
from sret_cli.data.soft_labels import StoredLabels
from sret_cli.data.sources import Source
from sret_cli.runtime.errors import SretError

Sample = tuple[Tensor, int | Tensor] | SretError  # the error if the image cannot be decoded


class Samples(Dataset):
    """Transformed 8-bit images `[C, Y, X]` and their targets, by key.

    A target is the number of a class. With stored soft labels, the images are the stored crops, and
    a target holds classes and their probabilities `[2, top_k]`.
    """

    def __init__(
        self, source: Source, transform: SampleTransform, labels: StoredLabels | None = None
    ) -> None:
        self.source = source
        self.transform = transform
        self.labels = labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample | Noted:
        """A sample, or the error of its image; an exception from a worker would lose its type."""
        return noted(lambda: self._sample(*key), lambda: self.source.filename(key[1]))

    def _sample(self, epoch: int, index: int, repeat: int) -> Sample:
        try:
            if self.labels is not None:  # each epoch takes the next crop of every image
                return self.labels.sample(self.source, index, epoch + repeat)
            image, target = self.source.open(index, self.transform.mode)
        except SretError as error:
            return error
        return self.transform(image, f"{epoch} {index} {repeat}"), target


def collate(batch: list[Any]) -> tuple[Tensor, Tensor, list[SretError], list[str]]:
    """Stacks the readable samples; also returns the errors of the others and Pillow's warnings."""
    samples, warnings = without_notes(batch)
    errors = [sample for sample in samples if isinstance(sample, SretError)]
    good = [sample for sample in samples if not isinstance(sample, SretError)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    soft = [target for _, target in good if isinstance(target, Tensor)]
    targets = torch.stack(soft) if soft else torch.tensor([target for _, target in good])
    return images, targets, errors, warnings
