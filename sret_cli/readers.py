"""Labelled images in tar files and in the datasets of torchvision and Hugging Face, by timm."""

import os
import sys
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from sret_cli.errors import DATA, SretError
from sret_cli.folders import TEST_NAMES, refuse_cut
from sret_cli.sources import Indexed, Source, test_folder, train_folder


@cache
def known_source(dataset: str, data_dir: str | None, training: bool) -> Source:
    """The same images as `stored_source`, listed once for all runs of a study."""
    return stored_source(dataset, data_dir, training)


def stored_source(dataset: str, data_dir: str | None, training: bool) -> Source:
    """The training or test images of a dataset that is read from files, but not as a stream.

    Raises:
        SretError: they are not there, or are not labelled images.
    """
    if dataset == "folder":
        folder = Path(data_dir or "")
        return train_folder(folder) if training else test_folder(folder)
    return named_source(dataset, data_dir, training)


@cache
def named_source(dataset: str, data_dir: str | None, training: bool) -> Source:
    """The training or test images of `tar`, `hfds`, `hfds/NAME` or `torch/NAME`.

    Raises:
        SretError: they are not there, or are not labelled images.
    """
    if dataset == "tar":
        return tar_source(Path(data_dir or ""), training)
    if dataset.startswith("torch/"):
        return torchvision_source(dataset, str(data_dir), training)
    return hugging_face_source(dataset, data_dir, training)


def tar_source(data_dir: Path, training: bool) -> Source:
    """Images in `train.tar` or in the tars in `train/`, and so for test; a folder or tar a class.

    Raises:
        SretError: there is none, it cannot be read, is cut short, or has a class that `train` has
            not.
    """
    found = _tar(data_dir, ("train",))
    root = found if training else _tar(data_dir, TEST_NAMES)
    if root is None:
        names = "train.tar" if training else "test.tar or val.tar"
        raise SretError(f"{data_dir} has no {names}, nor a folder of tar files of that name", DATA)
    try:
        # A tar file that stayed open would be shared by all workers, with one position.
        reader = ReaderImageInTar(str(root), cache_tarfiles=False)
    except (OSError, ValueError, AssertionError, tarfile.TarError) as error:
        raise SretError(f"cannot read {root}: {error or 'no images in it'}", DATA) from None
    _refuse_cut_tars(root, reader)
    classes = _without_hidden(root, reader)
    if training or found is None:
        return Source(str(root), reader, classes)
    trained = tar_source(data_dir, True).classes
    others = [name for name in classes if name not in set(trained)]
    if others:
        raise SretError(f"{root} has the class {others[0]!r}, which {found} has not", DATA)
    reader.targets = np.array([trained.index(name) for name in classes])[reader.targets]
    return Source(str(root), reader, trained)


def _refuse_cut_tars(root: Path, reader: ReaderImageInTar) -> None:
    """Makes sure that the tar files, and those in them that have images, have their ends."""
    for path in [root] if root.is_file() else sorted(root.glob("*.tar")):
        refuse_cut(path)
    inner = {(name, tar.offset_data, tar.size) for _, name, tar in reader.samples if tar}
    for name, start, size in sorted(inner, key=str):
        refuse_cut(root / name if name else root, start, size)


def _without_hidden(root: Path, reader: ReaderImageInTar) -> tuple[str, ...]:
    """Takes hidden files, such as macOS's `._1.jpg`, from a reader; the classes that are left."""
    hidden = [Path(info.name).name.startswith(".") for info, _, _ in reader.samples]
    shown = ~np.array(hidden)
    if not shown.any():
        raise SretError(f"cannot read {root}: no images in it but hidden ones", DATA)
    numbers, targets = np.unique(reader.targets[shown], return_inverse=True)
    reader.samples, reader.targets = reader.samples[shown], targets
    names = list(reader.class_name_to_idx)
    return tuple(str(names[number]) for number in numbers)


def _tar(data_dir: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        if (data_dir / f"{name}.tar").is_file():
            return data_dir / f"{name}.tar"
        if any((data_dir / name).glob("*.tar")):
            return data_dir / name
    return None


def torchvision_source(dataset: str, root: str, training: bool) -> Source:
    """Images of one of torchvision's datasets, which lie in `root`; nothing is downloaded.

    Raises:
        SretError: they are not there, or timm does not know the name.
    """
    split = "train" if training else "validation"
    try:
        found = create_dataset(dataset, root, split, download=False)
    except (AssertionError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "timm cannot make it"
        raise SretError(
            f"dataset = {dataset!r} in {root}: {reason.removesuffix('.')}; put its files there, "
            "as torchvision.datasets downloads them",
            DATA,
        ) from None
    classes = getattr(found, "classes", None)
    if not classes:
        raise SretError(f"dataset = {dataset!r} has no classes to train on", DATA)
    names = (", ".join(name) if isinstance(name, tuple) else str(name) for name in classes)
    return Source(f"{dataset} {split}", Indexed(found), tuple(names))


def hugging_face_source(dataset: str, data_dir: str | None, training: bool) -> Source:
    """Images of a Hugging Face dataset: a folder of parquet files or of images, or a cached one.

    `hfds` alone reads the folder `data_dir`; `hfds/NAME` a folder, or a dataset in the cache, which
    `data_dir` then is. Nothing is downloaded, unless the environment has HF_HUB_OFFLINE=0.

    Raises:
        SretError: it is not there, has no columns of images and classes, or a class that the split
            `train` has not.
    """
    try:
        import datasets
        from timm.data.readers.reader_hfds import ReaderHfds
    except ImportError:
        raise SretError("hfds needs the package datasets: pip install 'sret[data]'", DATA) from None
    if "HF_HUB_OFFLINE" not in os.environ:
        datasets.config.HF_HUB_OFFLINE = True
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name = dataset.partition("/")[2] or str(data_dir)
    root = data_dir if "/" in dataset else None
    try:
        splits = datasets.load_dataset(name, cache_dir=root)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SretError(f"cannot read the dataset {name}: {reason}", DATA) from None
    for split in ("train",) if training else TEST_NAMES:
        if split not in splits:
            continue
        image, label = _columns(name, splits[split].features)
        labels = splits[split].features[label]
        numbers = splits[split].unique(label)
        if not training and set(numbers) == {-1}:
            continue  # as in ImageNet's own test images, whose classes are secret
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise SretError(f"{name}, {split}: {label} holds other than numbers of classes", DATA)
        names = getattr(labels, "names", None)
        if names is None and not training and "train" in splits:
            names = named_source(dataset, data_dir, True).classes
        names = names or tuple(map(str, range(max(numbers, default=-1) + 1)))
        if max(numbers, default=-1) >= len(names):
            raise SretError(
                f"{name}, {split}: {label} holds the class {max(numbers)}, and there are "
                f"{len(names)} classes to train on, from 0; remove its images",
                DATA,
            )
        reader = ReaderHfds(name, root, split, input_key=image, target_key=label)
        return Source(f"{name} {split}", reader, tuple(names))
    wanted = "train" if training else "labelled " + ", ".join(TEST_NAMES)
    raise SretError(f"{name} has no split {wanted}, but {', '.join(splits)}", DATA)


def _columns(name: str, features: Any) -> tuple[str, str]:
    """The columns of images and of classes: those of such a type, else those of usual names."""
    image = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    label = [column for column, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    image += [column for column in ("image", "img") if column in features]
    label += [column for column in ("label", "labels") if column in features]
    if not image or not label:
        raise SretError(
            f"{name} has the columns {', '.join(features)}; name them image and label", DATA
        )
    return image[0], label[0]
