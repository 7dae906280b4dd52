"""Builds the loaders of a run's training and test images.

Neither the order of the samples nor their augmentation depends on the number of workers, on the
batch at which an epoch starts, or on the number of processes; for streams, both depend on them.
"""

from pathlib import Path

from sret_cli.data.augment import Pixels
from sret_cli.data.class_names import ClassList, match_classes
from sret_cli.data.fingerprint import Images, refuse_other_labels
from sret_cli.data.loader import Loader
from sret_cli.data.order import Batches, BatchPlan
from sret_cli.data.readers import known_source, stored_source
from sret_cli.data.samples import Samples
from sret_cli.data.soft_labels import StoredLabels, stored_classes
from sret_cli.data.sources import Source, digits, synthetic, test_folder, train_folder
from sret_cli.data.streams import Stream, find_shards
from sret_cli.runtime.errors import DATA, SretError, show_note_once
from sret_cli.spec.backbone import Spec
from sret_cli.spec.dataset import is_stream
from sret_cli.spec.train import TrainSpec


def load_data(
    train: TrainSpec,
    model: Spec,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    order: ClassList | None = None,
    known: bool = False,
) -> tuple[Loader, Loader]:
    """The loaders of a run's training and test images, for one rank.

    Args:
        train: the data and how they are augmented and divided into batches.
        model: its image size, channels and classes.
        workers: processes that load images; 0 loads in this process.
        rank: the number of this process.
        world_size: the number of processes that train together.
        order: the classes in the order of their numbers; by default that of the stored labels, or
            else that of the data.
        known: use the folders as this process has listed them before.

    Raises:
        SretError: the data are missing or hold no labelled images; their classes are not those of
            `order`; there are classes only in the test images; the model takes no such images; or a
            batch does not divide among the ranks.
    """
    parts = world_size * train.accumulation
    if train.batch_size % parts:
        fitting = train.batch_size + parts - train.batch_size % parts
        of_each = f" in {train.accumulation} parts" if train.accumulation > 1 else ""
        raise SretError(
            f"batch_size = {train.batch_size} does not divide among {world_size} processes"
            f"{of_each}; use {fitting}"
        )
    if order is None and train.soft_labels is not None:
        order = stored_classes(Path(train.soft_labels), train)
    training = _load(
        train,
        model,
        training=True,
        plan=_plan(train, train.seed, rank, world_size),
        workers=workers,
        order=order,
        known=known,
    )
    if order is None and training.named:
        order = training.class_list
    test = _load(
        train,
        model,
        training=False,
        plan=_plan(train, None, rank, world_size),
        workers=workers,
        order=order,
        known=known,
    )
    if len(test.classes) > len(training.classes):
        raise SretError(
            f"the test images have {len(test.classes):,} classes, up to {test.classes[-1]}, and "
            f"the training images have {len(training.classes):,}; remove images of the others",
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
    """The loader of a run's test images, and the names of their classes in the order of numbers.

    Raises:
        SretError: as for `load_data`; a folder needs no `train/`.
    """
    loader = _load(
        train,
        model,
        training=False,
        plan=_plan(train, None, rank, world_size),
        workers=workers,
        order=order,
        known=False,
    )
    return loader, loader.classes


def _plan(train: TrainSpec, seed: int | None, rank: int, world_size: int) -> BatchPlan:
    return BatchPlan(
        batch_size=train.batch_size,
        seed=seed,
        repeats=max(train.aug_repeats, 1),
        accumulation=train.accumulation,
        rank=rank,
        world_size=world_size,
    )


def _load(
    train: TrainSpec,
    model: Spec,
    training: bool,
    plan: BatchPlan,
    workers: int,
    order: ClassList | None,
    known: bool,
) -> Loader:
    if is_stream(train.dataset):
        return _load_stream(train, model, training, plan, workers, order)
    pixels = Pixels.of(train, model)
    transform = pixels.sample_transform(train, training)
    source = find_source(train, model, training, order, known)
    if training and len(source) < plan.world_size:
        raise SretError(
            f"{len(source)} images are too few for {plan.world_size} processes; use fewer", DATA
        )
    labels = None
    if training and train.soft_labels is not None:
        labels = StoredLabels(Path(train.soft_labels))
        labels.refuse_other(train, model, source)
        refuse_other_labels(labels, Images(source, train.data_dir, train.on_bad_image == "skip"))
    return Loader(
        samples=Samples(source, transform, labels),
        batches=Batches(len(source), plan),
        classes=source.classes,
        workers=workers,
        pixels=pixels,
        on_bad_image=train.on_bad_image,
        named=source.named,
    )


def _load_stream(
    train: TrainSpec,
    model: Spec,
    training: bool,
    plan: BatchPlan,
    workers: int,
    order: ClassList | None,
) -> Loader:
    pixels = Pixels.of(train, model)
    transform = pixels.sample_transform(train, training)
    if train.aug_repeats > 1:
        raise SretError(
            f"aug_repeats = {train.aug_repeats} needs images by index, and wds is a stream; use 0"
        )
    if training and train.soft_labels is not None:
        raise SretError("soft_labels need images by index, and wds is a stream; use a teacher")
    show_note_once(
        "wds is a stream: the order of its samples depends on the numbers of workers and processes;"
        " resumed with other numbers, a run does not give the same result"
    )
    shards = find_shards(str(train.data_dir), training, train.label_column)
    names = shards.names
    if order is not None:
        ours = ClassList(names, f"the data {train.data_dir}")
        names = names if match_classes(ours, order) is None else order.names
    stream = Stream(
        shards,
        transform,
        plan,
        workers=workers,
        num_classes=model.num_classes,
        label_column=train.label_column,
        names=names,
    )
    return Loader(
        samples=stream,
        batches=stream,
        classes=names or tuple(map(str, range(shards.classes or model.num_classes))),
        workers=min(workers, stream.workers),
        pixels=pixels,
        on_bad_image=train.on_bad_image,
        named=names is not None,
    )


def find_source(
    train: TrainSpec,
    model: Spec,
    training: bool,
    order: ClassList | None = None,
    known: bool = False,
) -> Source:
    """A run's training or test images by index, with classes numbered as in `order` if it is given.

    With `known`, folders are used as this process has listed them before.

    Raises:
        SretError: the images are missing, have no labels, or have other classes than `order`.
    """
    source = _find_source(train, model, training, known)
    if order is None or match_classes(source.class_list, order) is None:
        return source
    assert order.names is not None
    if train.dataset != "folder":
        return source.in_order(order.names)
    # A folder is listed again, class by class in this order: stored labels are found by index.
    read = train_folder if training else test_folder
    return read(Path(train.data_dir or ""), order.names)


def _find_source(train: TrainSpec, model: Spec, training: bool, known: bool) -> Source:
    if train.dataset == "digits":
        return digits()[0 if training else 1]
    if train.dataset == "synthetic":
        sources = synthetic(
            seed=train.seed,
            img_size=model.img_size,
            channels=model.in_chans,
            classes=model.num_classes,
        )
        return sources[0 if training else 1]
    read = known_source if known else stored_source
    return read(train.dataset, train.data_dir, training, train.label_column)
