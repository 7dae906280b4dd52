"""Finds what is wrong with a folder of images by decoding every file once, as training does."""

import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from sret_cli.data.decode import (
    UNREADABLE,
    bits_per_sample,
    decode_image,
    is_image,
    pillow_decodes,
    unreadable_error,
)
from sret_cli.data.folders import TEST_NAMES, class_folders, image_root
from sret_cli.data.image_notes import pillow_warnings
from sret_cli.data.sources import find_files
from sret_cli.runtime.errors import DATA, USAGE, SretError
from sret_cli.runtime.files import write_atomically

FILES_A_TASK = 16
FAR_APART = 10  # a class with this many times the images of another is reported
ORIENTATION = 0x0112  # the tag, TIFF 6.0 and EXIF 2.3; 1 is upright


@dataclass(frozen=True)
class Checked:
    """One line of the manifest: a file, and its contents if it can be decoded.

    `bits` are the bits of a sample, if a PNG or TIFF file records them. `pixels_sha256` is the hash
    of the decoded RGB pixels, which copies in other formats share. `orientation` is that of EXIF,
    from 1 to 8, unless Pillow rotates the image itself (TIFF). `warnings` are Pillow's.
    """

    path: str
    split: str
    class_name: str
    bytes: int | None = None
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    bits: int | None = None
    frames: int | None = None
    alpha: bool | None = None
    sha256: str | None = None
    pixels_sha256: str | None = None
    error: str | None = None
    orientation: int | None = None
    warnings: str | None = None

    def oddities(self) -> list[str]:
        """Unusual properties of the file; training converts such images to RGB or grey."""
        if self.mode is None:
            return []
        found = {
            "CMYK": self.mode == "CMYK",
            "16 bits or more": self.mode[0] in "IF" or (self.bits or 0) >= 16,
            "palette": self.mode == "P",
            "alpha": bool(self.alpha),
            "several frames": (self.frames or 1) > 1,
        }
        return [kind for kind, is_so in found.items() if is_so]


COLUMNS = [field.name for field in fields(Checked)]
COLUMNS_OF_FIRST_VERSION = 13  # later versions added columns at the end


@dataclass(frozen=True)
class Findings:
    """The results of a check of all files of a folder."""

    files: list[Checked]
    class_folders: dict[str, list[str]]  # of each split, including classes without images
    ignored: dict[str, int]  # files that training ignores, by extension

    @property
    def unreadable(self) -> list[Checked]:
        """The files that cannot be decoded."""
        return [file for file in self.files if file.error is not None]

    def duplicates(self) -> list[list[str]]:
        """Paths of equal files, or of equal pixels, in more than one split."""
        found: dict[tuple[str, ...], None] = {}
        for key in ("sha256", "pixels_sha256"):
            same = defaultdict(list)
            for file in self.files:
                same[getattr(file, key)].append(file)
            same.pop(None, None)
            groups = [group for group in same.values() if len({f.split for f in group}) > 1]
            found |= dict.fromkeys(tuple(sorted(f.path for f in group)) for group in groups)
        return [list(paths) for paths in found]

    def splits(self) -> dict[str, dict[str, int]]:
        """Images, classes and bytes of each split."""
        table: dict[str, dict[str, int]] = {}
        for name in dict.fromkeys(file.split for file in self.files):
            own = [file for file in self.files if file.split == name]
            table[name] = {
                "images": len(own),
                "classes": len({file.class_name for file in own} - {""}),
                "bytes": sum(file.bytes or 0 for file in own),
            }
        return table

    def images_by_class(self) -> dict[str, dict[str, int]]:
        """Number of images of each class in each split, including classes without images."""
        names = sorted({name for own in self.class_folders.values() for name in own})
        counts = Counter((file.split, file.class_name) for file in self.files)
        return {
            split: {name: counts[split, name] for name in names}
            for split, own in self.class_folders.items()
            if own
        }

    def imbalanced(self) -> dict[str, dict[str, list[Any]]]:
        """The largest and smallest class of splits whose classes differ much, as [name, images].

        Classes without images do not count; `missing_classes` has them.
        """
        found = {}
        for split, counts in self.images_by_class().items():
            present = [(name, images) for name, images in counts.items() if images]
            if present:
                largest = max(present, key=lambda item: item[1])
                smallest = min(present, key=lambda item: item[1])
                if largest[1] > FAR_APART * smallest[1]:
                    found[split] = {"largest": list(largest), "smallest": list(smallest)}
        return found

    def orientations(self) -> dict[str, list[str]]:
        """The paths of images with an EXIF orientation other than 1, by orientation."""
        found: dict[str, list[str]] = {}
        for file in sorted(self.files, key=lambda file: file.orientation or 1):
            if file.orientation is not None and file.orientation != 1:
                found.setdefault(str(file.orientation), []).append(file.path)
        return found

    def missing_classes(self) -> dict[str, list[str]]:
        """Classes without images in a split that has their folder, or that another split has."""
        classes: dict[str, set[str]] = {
            key: set() for key, own in self.class_folders.items() if own
        }
        for file in self.files:
            if file.class_name:
                classes[file.split].add(file.class_name)
        every = set().union(*classes.values(), *self.class_folders.values())
        return {split: sorted(every - own) for split, own in classes.items() if every - own}

    def odd(self) -> dict[str, list[str]]:
        """The paths of unusual files, by kind."""
        found = defaultdict(list)
        for file in self.files:
            for kind in file.oddities():
                found[kind].append(file.path)
        return dict(found)

    def summary(self) -> dict[str, Any]:
        """All findings, as plain values."""
        return {
            "images": len(self.files),
            "splits": self.splits(),
            "images_by_class": self.images_by_class(),
            "imbalanced": self.imbalanced(),
            "unreadable": {file.path: file.error for file in self.unreadable},
            "duplicates": self.duplicates(),
            "missing_classes": self.missing_classes(),
            "odd": self.odd(),
            "orientations": self.orientations(),
            "warnings": {file.path: file.warnings for file in self.files if file.warnings},
            "ignored": self.ignored,
        }


def check_folder(
    data_dir: Path, workers: int | None, on_step: Callable[[int, int, str], None]
) -> Findings:
    """Decodes every image of a folder once, by default with one process for each core.

    The splits are those of `train/`, `test/`, `val/` and `validation/` that exist; without any, the
    folder is one split. A class is a folder in a split.

    Raises:
        SretError: the folder does not exist, or has no image.
    """
    root = image_root(data_dir)
    names = [name for name in ("train", *TEST_NAMES) if (root / name).is_dir()]
    files = [file for name in names or [""] for file in _files(root, name)]
    jobs = [file for file in files if is_image(file.path)]
    ignored = Counter(_kind(Path(file.path)) for file in files if not is_image(file.path))
    if not jobs:
        raise SretError(f"no images in {data_dir}; name a folder with train/ and test/", DATA)
    found: list[Checked] = []
    bad = 0
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            for checked in pool.map(check_file, jobs, chunksize=FILES_A_TASK):
                found.append(checked)
                bad += checked.error is not None
                on_step(len(found), len(jobs), f"{bad} cannot be read")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    folders = {name: class_folders(root / name) for name in names or [""]}
    return Findings(found, folders, dict(sorted(ignored.items())))


def _files(root: Path, split: str) -> list[Checked]:
    """The files of a split, unread: those in class folders, and those next to the folders."""
    folder = root / split
    found = [
        Checked(path, split, name)
        for name in class_folders(folder)
        for path in find_files(folder / name)
    ]
    alone = sorted(path for path in folder.iterdir() if path.is_file())
    return found + [Checked(str(path), split, "") for path in alone]


def _kind(path: Path) -> str:
    """The kind under which a file that training ignores is counted."""
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "no extension"


def check_file(job: Checked) -> Checked:
    """The manifest line of a file."""
    try:
        data = Path(job.path).read_bytes()
    except OSError as error:
        return Checked(job.path, job.split, job.class_name, error=str(error))
    known: dict[str, Any] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with pillow_warnings() as warnings:
        try:
            known |= _decoded(data)
        except UNREADABLE as error:
            known["error"] = str(unreadable_error(job.path, error))
        else:
            known["orientation"] = orientation(data)
    known["warnings"] = "; ".join(warnings) or None
    return Checked(job.path, job.split, job.class_name, **known)


def _decoded(data: bytes) -> dict[str, Any]:
    """The contents of an image file."""
    pixels = decode_image(io.BytesIO(data), "RGB")
    with pillow_decodes(), Image.open(io.BytesIO(data)) as image:
        return {
            "width": image.width,
            "height": image.height,
            "mode": image.mode,
            "bits": bits_per_sample(image, data),
            "frames": getattr(image, "n_frames", 1),
            "alpha": "A" in image.getbands() or "transparency" in image.info,
            "pixels_sha256": hashlib.sha256(
                f"{pixels.size}".encode() + pixels.tobytes()
            ).hexdigest(),
        }


def orientation(data: bytes) -> int | None:
    """The EXIF orientation of an image, from 1 to 8, or None.

    None also for TIFF files, which Pillow rotates itself, and for damaged EXIF data, with which an
    image can still be trained on.
    """
    try:
        with pillow_decodes(), Image.open(io.BytesIO(data)) as image:
            # Pillow would decode a whole PNG file to look for EXIF data at its end.
            none = image.format == "PNG" and b"exif" not in data.lower()
            value = None if none or image.format == "TIFF" else image.getexif().get(ORIENTATION)
    except UNREADABLE:
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def refuse_to_overwrite(path: Path) -> None:
    """Raises if a file exists that is not a manifest and so must not be replaced.

    Raises:
        SretError: the file is something else, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            first = file.readline(10_000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SretError(
            f"cannot read {path}: {error.strerror}; choose another --manifest", USAGE
        ) from None
    columns = first.decode(errors="replace").rstrip().split(",")
    if columns != COLUMNS[: max(len(columns), COLUMNS_OF_FIRST_VERSION)]:
        raise SretError(
            f"{path} is there and is no manifest of `sret data check`; choose another --manifest",
            USAGE,
        )


def write_manifest(findings: Findings, path: Path) -> None:
    """Writes the manifest atomically as CSV, with one line for each file.

    Raises:
        SretError: the manifest cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, findings.files))
    # File names need not be UTF-8; their bytes are kept.
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))
