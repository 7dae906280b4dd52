"""Datasets by name, to loaders whose every sample is a function of (seed, epoch, index).

Neither the order of the samples nor their augmentation depends on the number of workers, on where
an epoch is begun, or on how many processes share it; of streams alone it does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sret_cli.data.augment import Pixels, temporarily_seeded
from sret_cli.data.class_names import ClassList, match_classes
from sret_cli.data.fingerprint import Images, refuse_other_labels
from sret_cli.data.image_notes import Noted, noted, tell_warnings, without_notes
from sret_cli.data.readers import known_source, stored_source
from sret_cli.data.soft_labels import StoredLabels, stored_classes
from sret_cli.data.sources import Source, digits, synthetic, test_folder, train_folder
from sret_cli.data.streams import Shards, Stream, find_shards
from sret_cli.runtime.errors import DATA, SretError, as_lost_process, show_note, show_note_once
from sret_cli.runtime.processes import places_of_rank
from sret_cli.runtime.signals import ignore_ended_processes
from sret_cli.spec.backbone import Spec
from sret_cli.spec.train import TrainSpec

Key = tuple[int, int, int]  # epoch, index, which repeat of the image in the epoch
Sample = tuple[Tensor, int | Tensor] | SretError  # the error where its image cannot be decoded


class Samples(Dataset):
    """Transformed images of 8 bits `[C, Y, X]`, and targets; where labels are stored, their crops.

    A target is a class, or classes and their probabilities `[2, top_k]`.
    """

    def __init__(
        self,
        source: Source,
        transform: Any,
        mode: str,
        seed: int | None,
        labels: StoredLabels | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.seed = seed  # None: the transform draws nothing
        self.labels = labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample | Noted:
        """A sample, or the error of its image: a worker's exceptions would lose their type."""
        return noted(lambda: self._sample(*key), lambda: self.source.filename(key[1]))

    def _sample(self, epoch: int, index: int, repeat: int) -> Sample:
        try:
            if self.labels is not None:  # each epoch has the next crop of every image
                return self.labels.sample(self.source, index, epoch + repeat)
            image, target = self.source.open(index, self.mode)
        except SretError as error:
            return error
        if self.seed is None:
            return self.transform(image), target
        with temporarily_seeded(f"{self.seed} {epoch} {index} {repeat}"):
            return self.transform(image), target


class Batches(Sampler[list[Key]]):
    """One rank's keys of the batches of an epoch, from batch `start` on.

    With a seed, the order is drawn from seed and epoch, each rank takes its share of each of the
    `parts` of a batch (`processes.share`), so that these are the same images whatever the number of
    ranks, and a last batch that is not full is dropped, unless it is the only one. Images that are
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
        parts: int = 1,
    ) -> None:
        self.samples, self.batch_size, self.seed, self.repeats = samples, batch_size, seed, repeats
        self.rank, self.world_size, self.parts = rank, world_size, parts
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
            parts = self.parts if len(places) == self.batch_size else 1
            mine = places_of_rank(len(places), self.rank, self.world_size, parts)
            yield [
                (self.epoch, int(order[place // self.repeats]), place % self.repeats)
                for place in (places[offset] for offset in mine)
            ]


class Loader:
    """Batches of 8-bit `images [B, C, Y, X]` and `targets [B]`, one rank's share of each.

    Where soft labels are stored, the targets of training are `[B, 2, top_k]`.

    `classes` are the names of the classes, in their order, or their numbers where they are not
    `named`; `bad_images` says what is wrong with each image that was left out so far.
    """

    def __init__(
        self,
        dataset: Samples | Stream,
        batches: Batches | Stream,
        classes: tuple[str, ...],
        workers: int,
        pixels: Pixels,
        on_bad_image: str,
        named: bool = True,
    ) -> None:
        self.named = named
        self.samples, self.batches, self.on_bad_image = dataset, batches, on_bad_image
        self.classes = classes
        self.mean, self.std = (
            torch.tensor(values).mul(255).view(1, -1, 1, 1) for values in (pixels.mean, pixels.std)
        )
        self.bad_images: list[str] = []
        self.workers = min(workers, batches.workers) if isinstance(batches, Stream) else workers
        self.loader = self._new_loader()

    def _new_loader(self) -> DataLoader:
        mapped = isinstance(self.batches, Batches)
        return DataLoader(
            self.samples,
            batch_sampler=self.batches if mapped else None,
            batch_size=1 if mapped else None,  # a stream makes its batches itself
            num_workers=self.workers,
            # A stream's workers learn the epoch and its start when they start.
            persistent_workers=mapped and self.workers > 0,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every epoch draws from the model's
        )

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def class_list(self) -> ClassList:
        """The classes, to be compared with those of other data or of a model."""
        names = self.classes if self.named else None
        remedy = "give the test images the classes of the training images"
        return ClassList(names, "the training images", remedy)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on; those before are not decoded.

        Raises:
            SretError: an image cannot be decoded; where they are to be skipped, none of a batch.
        """
        self.batches.epoch, self.batches.start = epoch, start
        for images, targets, errors, warnings in load_batches(self.loader):
            tell_warnings(warnings)
            if errors and (self.on_bad_image == "stop" or not len(targets)):
                # Held by the traceback, the workers would end late, and keep their end waiting for
                # 10 seconds; and raising the error itself would tie it and its traceback in a knot.
                self.loader = self._new_loader()
                skip = ", or leave it out by --on-bad-image skip" if len(targets) else ""
                raise SretError(f"{errors[0]}{skip}", errors[0].code)
            for text in map(str, errors):
                if text not in self.bad_images:
                    self.bad_images.append(text)
                    show_note(f"{text}; it is left out")
            yield images, targets

    @property
    def found(self) -> Source | Shards:
        """Where the images come from."""
        return self.samples.source if isinstance(self.samples, Samples) else self.samples.shards

    def normalize(self, x: Tensor) -> Tensor:
        """Images of 8 bits as float32, less the data's mean and over its deviation."""
        if self.mean.device != x.device:
            self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        return x.float().sub_(self.mean).div_(self.std)


def load_batches(loader: DataLoader) -> Iterator[Any]:
    """Yields the batches of a loader; a dead process of it always gives the same `RuntimeError`.

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


def collate(batch: list[Any]) -> tuple[Tensor, Tensor, list[SretError], list[str]]:
    """Stacks the samples that are good, beside the errors of the others and Pillow's warnings."""
    samples, warnings = without_notes(batch)
    errors = [sample for sample in samples if isinstance(sample, SretError)]
    good = [sample for sample in samples if not isinstance(sample, SretError)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    soft = [target for _, target in good if isinstance(target, Tensor)]
    targets = torch.stack(soft) if soft else torch.tensor([target for _, target in good])
    return images, targets, errors, warnings


def load_data(
    train: TrainSpec,
    model: Spec,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    order: ClassList | None = None,
    known: bool = False,
) -> tuple[Loader, Loader]:
    """The loaders of a run's training and test images: one rank's share of them.

    Classes have the numbers of `order`, where it is given, else of stored labels, else their own.
    Folders are listed anew, unless those that are `known` in this process are to be taken.

    Raises:
        SretError: the data are missing or hold no labelled images, their classes are not those of
            `order`, the test images have classes that those to train on have not, the model takes
            no images of this kind, or the batches do not divide among the ranks.
    """
    shares = world_size * train.accumulation
    if train.batch_size % shares:
        above = train.batch_size + shares - train.batch_size % shares
        parts = f" in {train.accumulation} parts" if train.accumulation > 1 else ""
        raise SretError(
            f"batch_size = {train.batch_size} does not divide among {world_size} processes{parts}; "
            f"use {above}"
        )
    where = workers, rank, world_size
    if order is None and train.soft_labels is not None:
        order = stored_classes(Path(train.soft_labels), train)
    training = _loader(train, model, True, *where, order, known)
    if order is None and training.named:
        order = training.class_list
    test = _loader(train, model, False, *where, order, known)
    if len(test.classes) > len(training.classes):
        raise SretError(
            f"the test images have {len(test.classes):,} classes, up to {test.classes[-1]}, and "
            f"those to train on {len(training.classes):,}; remove images of the others",
            DATA,
        )
    return training, test


def load_test_data(
    train: TrainSpec,
    model: Spec,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    order: ClassList | None = None,
) -> tuple[Loader, tuple[str, ...]]:
    """The loader of a run's test images alone, and the names of the classes, in their order.

    Raises:
        SretError: as `load_data`; a folder needs no `train/`.
    """
    loader = _loader(train, model, False, workers, rank, world_size, order)
    return loader, loader.classes


def _loader(
    train: TrainSpec,
    model: Spec,
    training: bool,
    workers: int,
    rank: int,
    world_size: int,
    order: ClassList | None,
    known: bool = False,
) -> Loader:
    pixels = Pixels.of(train, model)
    transform = pixels.augmentation(train) if training else pixels.transform(train)
    if train.dataset == "synthetic":
        transform = MaybePILToTensor()  # which would cost more than the images themselves
    seed = train.seed if training else None
    if train.dataset == "wds":
        where = workers, rank, world_size
        return _stream_loader(train, pixels, transform, model, seed, *where, order)
    source = find_source(train, model, training, order, known)
    if training and len(source) < world_size:
        raise SretError(f"{len(source)} images do not feed {world_size} processes", DATA)
    labels = None
    if training and train.soft_labels is not None:
        labels = StoredLabels(Path(train.soft_labels))
        labels.refuse_other(train, model, source)
        refuse_other_labels(labels, Images(source, train.data_dir, train.on_bad_image == "skip"))
    samples = Samples(source, transform, pixels.mode, seed, labels)
    repeats = max(train.aug_repeats, 1)
    batches = Batches(
        *(len(source), train.batch_size, seed, repeats, rank, world_size, train.accumulation)
    )
    return Loader(
        *(samples, batches, source.classes, workers, pixels, train.on_bad_image),
        named=source.named,
    )


def _stream_loader(
    train: TrainSpec,
    pixels: Pixels,
    transform: Any,
    model: Spec,
    seed: int | None,
    workers: int,
    rank: int,
    world_size: int,
    order: ClassList | None,
) -> Loader:
    if train.aug_repeats > 1:
        raise SretError(
            f"aug_repeats = {train.aug_repeats} needs images by index, and wds is a stream; use 0"
        )
    if seed is not None and train.soft_labels is not None:
        raise SretError("soft_labels need images by index, and wds is a stream; use a teacher")
    show_note_once(
        "wds is a stream: the order of its samples depends on the numbers of workers and processes,"
        " and a run that goes on with others is not the same run"
    )
    shards = find_shards(str(train.data_dir), seed is not None, train.label_column)
    names = shards.names
    if order is not None:
        ours = ClassList(names, f"the data {train.data_dir}")
        names = names if match_classes(ours, order) is None else order.names
    stream = Stream(
        *(shards, transform, pixels.mode, model.num_classes, train.batch_size),
        *(seed, rank, world_size, workers),
        label_column=train.label_column,
        names=names,
    )
    classes = names or tuple(map(str, range(shards.classes or model.num_classes)))
    return Loader(
        *(stream, stream, classes, workers, pixels, train.on_bad_image),
        named=names is not None,
    )


def find_source(
    train: TrainSpec,
    model: Spec,
    training: bool,
    order: ClassList | None = None,
    known: bool = False,
) -> Source:
    """A run's training or test images, by index; as they were listed before, where `known`.

    Classes have the numbers of `order`, where it is given, else those that the data give them.

    Raises:
        SretError: they are missing, hold no labelled images, or have other classes than `order`.
    """
    source = _find_source(train, model, training, known)
    if order is None or match_classes(source.class_list, order) is None:
        return source
    assert order.names is not None
    if train.dataset != "folder":
        return source.in_order(order.names)
    # Images of a folder are listed class by class, and their places are those of stored labels.
    data_dir = Path(train.data_dir or "")
    read = train_folder if training else test_folder
    return read(data_dir, order.names)


def _find_source(train: TrainSpec, model: Spec, training: bool, known: bool) -> Source:
    if train.dataset == "digits":
        return digits()[0 if training else 1]
    if train.dataset == "synthetic":
        found = synthetic(train.seed, model.img_size, model.in_chans, model.num_classes)
        return found[0 if training else 1]
    source_of = known_source if known else stored_source
    return source_of(train.dataset, train.data_dir, training, train.label_column)
