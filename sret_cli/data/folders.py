"""Where a folder of images keeps its splits and classes."""

import csv
from pathlib import Path
from typing import BinaryIO

from sret_cli.data.class_names import order_classes
from sret_cli.runtime.errors import DATA, SretError

TEST_NAMES = ("test", "val", "validation", "valid")
KAGGLE_IMAGENET = Path("ILSVRC", "Data", "CLS-LOC")
KAGGLE_LABELS = "LOC_val_solution.csv"
TAR_BLOCK = 512  # bytes, of which an archive ends with two or more that are zero
COMPRESSED = b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"  # how such files begin


def image_root(data_dir: Path) -> Path:
    """The folder with `train/`: `data_dir`, or the one in ImageNet as Kaggle unpacks it.

    Raises:
        SretError: there is no such folder.
    """
    if not data_dir.is_dir():
        raise SretError(f"no folder {data_dir}; --data-dir names one with train/ and test/", DATA)
    inner = data_dir / KAGGLE_IMAGENET
    return inner if inner.is_dir() else data_dir


def find_test(root: Path) -> Path | None:
    """The folder of test images in a root; of several, the first with a folder a class."""
    found = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    return next((folder for folder in found if class_folders(folder)), found[0] if found else None)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, in the order of classes, without hidden ones."""
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return order_classes(name for name in names if not name.startswith("."))


def folder_classes(data_dir: Path) -> list[str]:
    """The class names of an image folder: the directories of its `train/`, in timm's order.

    Raises:
        SretError: there is no such folder, it has no `train/`, or that has fewer than two classes.
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
    """The flat `val/` of ImageNet as Kaggle unpacks it, and each image's class; None elsewhere."""
    solution = data_dir / KAGGLE_LABELS
    if not solution.is_file() or not (data_dir / KAGGLE_IMAGENET / "val").is_dir():
        return None
    with solution.open(newline="", encoding="utf-8") as file:
        labels = {
            row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)
        }
    return data_dir / KAGGLE_IMAGENET / "val", labels


def refuse_cut(path: Path, start: int = 0, size: int | None = None) -> None:
    """Makes sure that a tar file, or the one that lies in it from `start` on, has its end.

    One that was cut between two members reads as a whole one with fewer. Compressed files know
    their end themselves.

    Raises:
        SretError: it has no block of zeros at its end, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2) if size is None else start + size
            whole = _has_tar_end(file, start, end)
    except OSError as error:
        raise SretError(f"cannot read {path}: {error}; mend or remove it", DATA) from None
    if not whole:
        raise SretError(
            f"{path} is cut short: it has no end of archive; copy or write it again", DATA
        )


def _has_tar_end(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    if file.read(6).startswith(COMPRESSED):
        return True
    file.seek(max(end - TAR_BLOCK, start))
    return file.read(TAR_BLOCK) == bytes(TAR_BLOCK)
