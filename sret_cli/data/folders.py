"""Finds the splits and classes in a folder of images."""

import csv
from pathlib import Path
from typing import BinaryIO

from sret_cli.data.class_names import order_classes
from sret_cli.runtime.errors import DATA, SretError

TEST_NAMES = ("test", "val", "validation", "valid")
KAGGLE_IMAGENET = Path("ILSVRC", "Data", "CLS-LOC")
KAGGLE_LABELS = "LOC_val_solution.csv"
TAR_BLOCK = 512  # bytes; an archive ends with two or more blocks of zeros
COMPRESSED = b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"  # first bytes of such files


def image_root(data_dir: Path) -> Path:
    """The folder with `train/`: `data_dir` itself, or `ILSVRC/Data/CLS-LOC` of Kaggle's ImageNet.

    Raises:
        SretError: `data_dir` does not exist.
    """
    if not data_dir.is_dir():
        raise SretError(f"no folder {data_dir}; --data-dir names one with train/ and test/", DATA)
    inner = data_dir / KAGGLE_IMAGENET
    return inner if inner.is_dir() else data_dir


def find_test(root: Path) -> Path | None:
    """The folder of test images in a root; of several, the first that has folders of classes."""
    found = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    return next((folder for folder in found if class_folders(folder)), found[0] if found else None)


def class_folders(folder: Path) -> list[str]:
    """The names of the classes: the folders in a folder that are not hidden, in timm's order."""
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return order_classes(name for name in names if not name.startswith("."))


def folder_classes(data_dir: Path) -> list[str]:
    """The class names of an image folder: the directories of its `train/`, in timm's order.

    Raises:
        SretError: the folder or its `train/` is missing, or there are fewer than two classes.
    """
    root = image_root(data_dir)
    train = root / "train"
    if not train.is_dir():
        raise SretError(f"{root} has no train/; put one folder of images a class in it", DATA)
    classes = class_folders(train)
    if len(classes) < 2:
        raise SretError(
            f"{train} has {len(classes)} class folders; give it 2 or more, each with its images",
            DATA,
        )
    return classes


def kaggle_labels(data_dir: Path) -> tuple[Path, dict[str, str]] | None:
    """The flat `val/` of Kaggle's ImageNet and the class of each image; None for other folders."""
    solution = data_dir / KAGGLE_LABELS
    if not solution.is_file() or not (data_dir / KAGGLE_IMAGENET / "val").is_dir():
        return None
    with solution.open(newline="", encoding="utf-8") as file:
        labels = {
            row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)
        }
    return data_dir / KAGGLE_IMAGENET / "val", labels


def refuse_cut(path: Path, start: int = 0, size: int | None = None) -> None:
    """Raises if a tar file, or the tar file inside it from byte `start` on, is cut short.

    A file that was cut between two members would be read without an error. Compressed files are not
    checked here, since decompression raises an error.

    Raises:
        SretError: no block of zeros is at its end, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2) if size is None else start + size
            is_complete = _has_tar_end(file, start, end)
    except OSError as error:
        raise SretError(f"cannot read {path}: {error}; fix or remove it", DATA) from None
    if not is_complete:
        raise SretError(
            f"{path} is cut short: the end of the archive is missing; copy or write it again", DATA
        )


def _has_tar_end(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    if file.read(6).startswith(COMPRESSED):
        return True
    file.seek(max(end - TAR_BLOCK, start))
    return file.read(TAR_BLOCK) == bytes(TAR_BLOCK)
