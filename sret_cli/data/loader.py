"""Loads the batches of an epoch with torch's `DataLoader`, in several processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sret_cli.data.augment import Pixels, as_byte_values
from sret_cli.data.class_names import ClassList
from sret_cli.data.image_notes import show_warnings
from sret_cli.data.order import Batches
from sret_cli.data.samples import Samples, collate
from sret_cli.data.sources import Source
from sret_cli.data.streams import Shards, Stream
from sret_cli.runtime.errors import SretError, as_lost_process, show_note
from sret_cli.runtime.signals import ignore_ended_processes


class Loader:
    """One rank's part of batches of 8-bit `images [B, C, Y, X]` and `targets [B]`.

    With stored soft labels, the targets of training are `[B, 2, top_k]`.

    `batches` is the stream itself where samples come from a stream. `classes` are the names of the
    classes, in order, or their numbers as text if they are not `named`. `bad_images` holds the
    errors of the images that were left out so far.
    """

    def __init__(
        self,
        samples: Samples | Stream,
        batches: Batches | Stream,
        classes: tuple[str, ...],
        workers: int,
        pixels: Pixels,
        on_bad_image: str,
        named: bool = True,
    ) -> None:
        self.samples, self.batches, self.on_bad_image = samples, batches, on_bad_image
        self.classes, self.named = classes, named
        self.workers = workers
        self.mean, self.std = as_byte_values(pixels.mean), as_byte_values(pixels.std)
        self.bad_images: list[str] = []
        self.loader = self._new_loader()

    def _new_loader(self) -> DataLoader:
        is_stream = isinstance(self.batches, Stream)
        return DataLoader(
            self.samples,
            batch_sampler=None if is_stream else self.batches,
            batch_size=None if is_stream else 1,  # a stream makes its batches itself
            num_workers=self.workers,
            # The workers of a stream read `epoch` and `start` only when they start.
            persistent_workers=self.workers > 0 and not is_stream,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise every epoch draws from the model's generator
        )

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def source(self) -> Source | Shards:
        """Where the images come from."""
        return self.samples.source

    @property
    def class_list(self) -> ClassList:
        """The classes, to be compared with those of other data or of a model."""
        names = self.classes if self.named else None
        remedy = "give the test images the classes of the training images"
        return ClassList(names, "the training images", remedy)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on; earlier ones are not decoded.

        Raises:
            SretError: an image cannot be decoded; with `on_bad_image = "skip"`, no image of a batch
                can.
        """
        self.batches.epoch, self.batches.start = epoch, start
        for images, targets, errors, warnings in load_batches(self.loader):
            show_warnings(warnings)
            if errors and (self.on_bad_image == "stop" or not len(targets)):
                # The traceback would keep the old loader's workers alive, and ending them would
                # then take 10 seconds. A new error avoids a reference cycle with its traceback.
                self.loader = self._new_loader()
                skip = ", or leave it out by --on-bad-image skip" if len(targets) else ""
                raise SretError(f"{errors[0]}{skip}", errors[0].code)
            for text in map(str, errors):
                if text not in self.bad_images:
                    self.bad_images.append(text)
                    show_note(f"{text}; it is left out")
            yield images, targets

    def normalize(self, x: Tensor) -> Tensor:
        """8-bit images as float32, minus the data's mean and divided by its deviation."""
        if self.mean.device != x.device:
            self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        return x.float().sub_(self.mean).div_(self.std)


def load_batches(loader: DataLoader) -> Iterator[Any]:
    """Yields the batches of a loader; a lost process always raises the same `RuntimeError`.

    Raises:
        RuntimeError: a process that loads images is gone; `errors.as_loader_lost` recognises it.
    """
    try:
        batches = iter(loader)
        ignore_ended_processes()
        yield from batches
    except (OSError, EOFError, RuntimeError) as error:
        lost = as_lost_process(error, loader.num_workers)
        if lost is None:
            raise
        raise lost from error
