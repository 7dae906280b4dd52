"""Labelled images in tar files and in datasets of torchvision and Hugging Face, read by timm."""

import json
import os
import sys
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from timm.data import create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from sret_cli.data.class_names import order_classes
from sret_cli.data.folders import TEST_NAMES, refuse_cut
from sret_cli.data.sources import Source, TorchvisionImages, test_folder, train_folder
from sret_cli.runtime.errors import DATA, SretError, first_line

USUAL_LABELS = ("label", "labels")


@cache
def known_source(
    dataset: str, data_dir: str | None, training: bool, label_column: str | None = None
) -> Source:
    """The same images as `stored_source`, listed once for all runs of a study."""
    # Cached by the arguments as they are passed: all callers pass them by position.
    return stored_source(dataset, data_dir, training, label_column)


def stored_source(
    dataset: str, data_dir: str | None, training: bool, label_column: str | None = None
) -> Source:
    """The training or test images of a dataset that is read from files by index.

    Raises:
        SretError: the images are missing, or have no labels.
    """
    if dataset == "folder":
        folder = Path(data_dir or "")
        return train_folder(folder) if training else test_folder(folder)
    return named_source(dataset, data_dir, training, label_column)


@cache
def named_source(
    dataset: str, data_dir: str | None, training: bool, label_column: str | None = None
) -> Source:
    """The training or test images of `tar`, `hfds`, `hfds/NAME` or `torch/NAME`.

    Raises:
        SretError: the images are missing, or have no labels.
    """
    if dataset == "tar":
        return tar_source(Path(data_dir or ""), training)
    if dataset.startswith("torch/"):
        return torchvision_source(dataset, str(data_dir), training)
    return hugging_face_source(dataset, data_dir, training, label_column)


def tar_source(data_dir: Path, training: bool) -> Source:
    """Images of `train.tar` with a folder a class, or of `train/` with a tar file a class.

    Test images have the same layouts.

    Raises:
        SretError: no such file exists, or one cannot be read or is cut short; the test images have
            a class that the training images do not have.
    """
    train_root = _tar(data_dir, ("train",))
    root = train_root if training else _tar(data_dir, TEST_NAMES)
    if root is None:
        names = "train.tar" if training else "test.tar or val.tar"
        raise SretError(
            f"{data_dir} has neither {names} nor a folder of tar files with that name", DATA
        )
    try:
        # All workers would read from the same position of a tar file that stays open.
        reader = ReaderImageInTar(str(root), cache_tarfiles=False)
    except (OSError, ValueError, AssertionError, tarfile.TarError) as error:
        raise SretError(f"cannot read {root}: {error or 'it has no images'}", DATA) from None
    _refuse_cut_tars(root, reader)
    classes = _without_hidden(root, reader)
    if training or train_root is None:
        return Source(str(root), reader, classes)
    trained = tar_source(data_dir, True).classes
    others = [name for name in classes if name not in set(trained)]
    if others:
        raise SretError(
            f"{root} has the class {others[0]!r}, which {train_root} does not have; remove its "
            "images",
            DATA,
        )
    reader.targets = np.array([trained.index(name) for name in classes])[reader.targets]
    return Source(str(root), reader, trained)


def _refuse_cut_tars(root: Path, reader: ReaderImageInTar) -> None:
    """Raises if a tar file, or one inside it that has images, is cut short."""
    for path in [root] if root.is_file() else sorted(root.glob("*.tar")):
        refuse_cut(path)
    inner = {(name, tar.offset_data, tar.size) for _, name, tar in reader.samples if tar}
    for name, start, size in sorted(inner, key=str):
        refuse_cut(root / name if name else root, start, size)


def _without_hidden(root: Path, reader: ReaderImageInTar) -> tuple[str, ...]:
    """Removes hidden files, such as `._1.jpg` of macOS, from a reader; returns the classes left."""
    is_hidden = [Path(info.name).name.startswith(".") for info, _, _ in reader.samples]
    shown = ~np.array(is_hidden)
    if not shown.any():
        raise SretError(f"cannot read {root}: all its images are hidden files", DATA)
    names = {number: str(name) for name, number in reader.class_name_to_idx.items()}
    targets = [names[int(number)] for number in reader.targets[shown]]
    classes = order_classes(targets)
    places = {name: place for place, name in enumerate(classes)}
    reader.samples = reader.samples[shown]
    reader.targets = np.array([places[name] for name in targets])
    return tuple(classes)


def _tar(data_dir: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        if (data_dir / f"{name}.tar").is_file():
            return data_dir / f"{name}.tar"
        if any((data_dir / name).glob("*.tar")):
            return data_dir / name
    return None


def torchvision_source(dataset: str, root: str, training: bool) -> Source:
    """Images of a torchvision dataset in the folder `root`; nothing is downloaded.

    Raises:
        SretError: the files are missing, timm does not know the name, or there are no classes.
    """
    split = "train" if training else "validation"
    try:
        images = create_dataset(dataset, root, split, download=False)
    except (AssertionError, OSError, RuntimeError) as error:
        reason = first_line(error, "timm cannot read it")
        raise SretError(
            f"dataset = {dataset!r} in {root}: {reason.removesuffix('.')}; put its files there, "
            "as torchvision.datasets downloads them",
            DATA,
        ) from None
    classes = getattr(images, "classes", None)  # which not every torchvision dataset has
    if not classes:
        raise SretError(f"dataset = {dataset!r} has no classes to train on", DATA)
    names = (", ".join(name) if isinstance(name, tuple) else str(name) for name in classes)
    return Source(f"{dataset} {split}", TorchvisionImages(images), tuple(names))


def hugging_face_source(
    dataset: str, data_dir: str | None, training: bool, label_column: str | None = None
) -> Source:
    """Images of a Hugging Face dataset: a folder of parquet files or of images, or a cached one.

    `hfds` reads the folder `data_dir`; `hfds/NAME` reads a folder, or a dataset in the cache, for
    which `data_dir` then names the cache. Nothing is downloaded unless HF_HUB_OFFLINE=0 is set. A
    `ClassLabel` gives the order of classes; `order_classes` sorts names in a column of text.

    Raises:
        SretError: the dataset is missing; it has no column of images or of classes, or several of
            classes to choose from; a test image has a class that no training image has.
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
        raise SretError(f"cannot read the dataset {name}: {first_line(error)}", DATA) from None
    for split in ("train",) if training else TEST_NAMES:
        if split not in splits:
            continue
        features = splits[split].features
        image, label = _image_column(name, features), _label_column(name, features, label_column)
        labels = splits[split].unique(label)
        if not training and set(labels) == {-1}:
            continue  # as for the test images of ImageNet, whose classes are secret
        trained = None
        if not training and "train" in splits:
            trained = named_source(dataset, data_dir, True, label_column)
        where = f"{name}, {split}: {label}"
        numbers = None
        if _column_type(features[label]) == "text":
            names, named = _names(where, labels, None if trained is None else trained.classes), True
            numbers = {class_: number for number, class_ in enumerate(names)}
        else:
            of_files = _file_names(name, root, split, label, features[label])
            names, named = _numbered(where, labels, of_files, trained)
        reader = ReaderHfds(
            name,
            root=root,
            split=split,
            class_map=numbers,
            input_key=image,
            target_key=label,
        )
        return Source(f"{name} {split}", reader, names, named)
    wanted = "train" if training else "labelled " + ", ".join(TEST_NAMES)
    raise SretError(f"{name} has no split {wanted}; it has {', '.join(splits)}", DATA)


def _image_column(name: str, features: Any) -> str:
    """The column of images: the first of that type, else the one called image or img."""
    columns = [column for column in features if _column_type(features[column]) == "images"]
    columns += [column for column in ("image", "img") if column in features]
    if not columns:
        raise SretError(
            f"{name} has the columns {', '.join(features)}, none of them with images; rename the "
            "column of images to image",
            DATA,
        )
    return columns[0]


def _label_column(name: str, features: Any, chosen: str | None) -> str:
    """The column of classes: the chosen one, else `label`, else the only candidate."""
    types = {column: _column_type(features[column]) for column in features if "," not in column}
    fitting = [c for c, type_ in types.items() if type_ in ("classes", "numbers", "text")]
    candidates = [c for c in fitting if types[c] == "classes" or c in USUAL_LABELS]
    by = "choose one by train.label_column (--label-column in eval)"
    choose = f"{by}: {', '.join(fitting)}" if fitting else "add one"
    if chosen is not None and chosen not in fitting:
        what = "holds neither numbers nor names of classes" if chosen in features else "is not one"
        raise SretError(
            f"{name} has the columns {', '.join(features)}; {chosen!r} {what}; {choose}", DATA
        )
    if not candidates and chosen is None:
        raise SretError(
            f"{name} has the columns {', '.join(features)}, none of them called label or of the "
            f"type ClassLabel; {choose}",
            DATA,
        )
    if len(candidates) > 1 and chosen is None and "label" not in candidates:
        raise SretError(
            f"{name} has {len(candidates)} columns of classes, {', '.join(candidates)}, none of "
            f"them called label; {by}",
            DATA,
        )
    return chosen or ("label" if "label" in candidates else candidates[0])


def _column_type(feature: Any) -> Literal["images", "classes", "numbers", "text", "other"]:
    """What a column of the package `datasets` holds; `classes` is its `ClassLabel`."""
    # By the name of the type and by `dtype`, which lists and dictionaries do not have: the package
    # is optional, so its types cannot be imported here.
    name, dtype = type(feature).__name__, str(getattr(feature, "dtype", ""))
    if name == "Image":
        return "images"
    if name == "ClassLabel":
        return "classes"
    if dtype in ("string", "large_string"):
        return "text"
    return "numbers" if dtype.removeprefix("u").startswith("int") else "other"


def _names(where: str, labels: list[Any], trained: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes of a column of text; for test images, those of the training images."""
    if None in labels:
        raise SretError(f"{where} has images without a class; remove them", DATA)
    others = order_classes(set(labels) - set(trained or labels))
    if others:
        raise SretError(
            f"{where} holds the class {others[0]!r}, which the training images do not have; "
            "remove its images",
            DATA,
        )
    return trained or tuple(order_classes(labels))


def _numbered(
    where: str, labels: list[Any], names: tuple[str, ...] | None, trained: Source | None
) -> tuple[tuple[str, ...], bool]:
    """The classes of a column of numbers, and whether their names are known."""
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise SretError(
            f"{where} holds values that are not numbers of classes; remove their images, or choose "
            "another column by train.label_column",
            DATA,
        )
    named = names is not None
    if names is None and trained is not None:
        names, named = trained.classes, trained.named
    highest = max(labels, default=-1)
    names = names or tuple(map(str, range(highest + 1)))
    if highest >= len(names):
        raise SretError(
            f"{where} holds the class {highest}, and there are {len(names)} classes to train on, "
            "numbered from 0; remove its images",
            DATA,
        )
    return names, named


def _file_names(
    name: str, root: str | None, split: str, label: str, feature: Any
) -> tuple[str, ...] | None:
    """The class names that the parquet files of a split store; None if this is no `ClassLabel`.

    The package datasets uses the names of the first file for all files, even if others have another
    order.

    Raises:
        SretError: two files have different names or another order.
    """
    if _column_type(feature) != "classes":
        return None
    from datasets import load_dataset_builder
    from pyarrow import parquet

    files = load_dataset_builder(name, cache_dir=root).config.data_files or {}
    found: dict[tuple[str, ...], str] = {}
    for path in map(str, files.get(split, ())):
        if path.endswith(".parquet") and os.path.isfile(path):
            about = json.loads((parquet.read_schema(path).metadata or {}).get(b"huggingface", "{}"))
            stored = ((about.get("info") or {}).get("features") or {}).get(label) or {}
            if names := tuple(stored.get("names", ())):
                found.setdefault(names, path)
    if len(found) > 1:
        (first, path), (second, other), *_ = found.items()
        differ = next(n for n in range(len(first) + 1) if first[n : n + 1] != second[n : n + 1])
        raise SretError(
            f"{path} and {other} number the classes of {label} differently, first the class "
            f"{differ}; write them with one ClassLabel",
            DATA,
        )
    return next(iter(found), tuple(feature.names))
