"""Every image of a source by class, name and size, without reading it; and the bytes of one."""

import csv
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sret_cli.data.decode import decode_image
from sret_cli.data.sources import Indexed, Listed, Source
from sret_cli.data.streams import Shards
from sret_cli.runtime.errors import DATA, SretError

BLOCK_BYTES = 65_536
MANIFEST_COLUMNS = ("path", "split", "class_name", "bytes", "sha256")
UNKNOWN_SIZE = -1  # of a file that cannot be looked at


class Image(NamedTuple):
    """An image as it is compared; `place` is its index in the source."""

    class_name: str
    name: str
    size: int
    place: int


def list_images(found: Source | Shards) -> list[Image]:
    """All images, sorted by their classes and names; of shards, the shards."""
    return sorted(Image(*values) for values in _listing(found))


def _listing(found: Source | Shards) -> Iterator[tuple[str, str, int, int]]:
    """Class, name, size and index of each image."""
    if isinstance(found, Shards):
        for index, (path, samples) in enumerate(zip(found.paths, found.samples, strict=True)):
            yield "", f"{os.path.basename(path)} of {samples:,} samples", _size(path), index
    elif isinstance(found.images, Listed):
        yield from _listing_of_files(found, found.images)
    elif isinstance(found.images, Indexed):
        yield from _listing_of_torchvision(found, found.images.dataset)
    elif hasattr(found.images, "dataset"):
        yield from _listing_of_hugging_face(found, found.images)
    else:
        reader: Any = found.images
        for index, (member, *outer) in enumerate(reader.samples):
            inside = (getattr(part, "name", part) for part in outer if part)
            name = "/".join([*inside, member.name])
            yield _class_name(found, reader.targets[index]), name, member.size, index


def _class_name(found: Source, label: int | str) -> str:
    """The class of a label as the data have it: a name, or a number before it is renumbered."""
    if isinstance(label, str):
        return label
    return found.classes[found.numbers[label] if found.numbers else label]


def _listing_of_files(found: Source, images: Listed) -> Iterator[tuple[str, str, int, int]]:
    root = f"{found.name}{os.sep}"
    for index, (image, target) in enumerate(zip(images.images, images.targets, strict=True)):
        if isinstance(image, str):
            yield _class_name(found, target), image.removeprefix(root), _size(image), index
        else:
            yield _class_name(found, target), str(index), image.nbytes, index


def _listing_of_torchvision(found: Source, dataset: Any) -> Iterator[tuple[str, str, int, int]]:
    paths, targets = _torchvision_paths(dataset), _torchvision_targets(dataset)
    pixels = pixels_in_memory(found)
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    for index in range(len(found)):
        target = targets[index] if targets is not None else -1
        known = 0 <= target < len(found.classes)
        class_name = _class_name(found, target) if known else str(target)
        if paths:
            yield class_name, os.path.relpath(paths[index], root or "."), _size(paths[index]), index
        else:
            yield class_name, str(index), 0 if pixels is None else pixels[index].nbytes, index


def _torchvision_paths(dataset: Any) -> list[str]:
    """The files of a dataset of torchvision's that are one an image, or none."""
    if hasattr(dataset, "all_categories"):  # INaturalist, which has a number and a name of each
        folders = dataset.all_categories
        return [os.path.join(dataset.root, folders[number], name) for number, name in dataset.index]
    return [str(path) for path, *_ in getattr(dataset, "imgs", ())]


def _torchvision_targets(dataset: Any) -> list[int] | None:
    for name in ("targets", "labels"):
        if (values := getattr(dataset, name, None)) is not None:
            return [int(value) for value in values]
    if hasattr(dataset, "all_categories"):
        return [number for number, _ in dataset.index]
    return [target for _, target in getattr(dataset, "imgs", ())] or None


def _listing_of_hugging_face(found: Source, reader: Any) -> Iterator[tuple[str, str, int, int]]:
    """No image is read: its size follows from where it begins. Rows have their order for a name."""
    from pyarrow import compute

    index = 0
    for table in reader.dataset.with_format("arrow").iter(10_000):
        images = table[reader.image_key]
        sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
        paths = compute.struct_field(images, "path").to_pylist()
        targets = table[reader.label_key].to_pylist()
        for path, size, target in zip(paths, sizes, targets, strict=True):
            size = size if size is not None else _size(path or "")
            yield _class_name(found, target), f"{index} {os.path.basename(path or '')}", size, index
            index += 1


def pixels_in_memory(found: Source) -> Any:
    """All images `[N, …]`, where they are arrays in memory, else None."""
    images: Any = found.images
    if isinstance(images, Listed):
        return None if isinstance(images.images[0], str) else images.images
    data = getattr(images.dataset, "data", None) if isinstance(images, Indexed) else None
    if isinstance(data, Tensor):
        return data.numpy()
    return data if isinstance(data, np.ndarray) else None


def read_image(found: Source, index: int) -> Any:
    """The bytes of an image's file, or its pixels where it has none of its own.

    Raises:
        OSError and others of `sources.UNREADABLE`: it cannot be read.
    """
    pixels = pixels_in_memory(found)
    if pixels is not None:
        return np.ascontiguousarray(pixels[index]).data
    if isinstance(found.images, Indexed) and (paths := _torchvision_paths(found.images.dataset)):
        return Path(paths[index]).read_bytes()
    image, _ = found.images[index]
    if hasattr(image, "read"):
        with image:
            return image.read()
    return decode_image(image, "RGB").tobytes()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return UNKNOWN_SIZE


def sum_of_blocks(path: str, blocks: int, seed: int) -> str:
    """The SHA-256 of some blocks of a file, of 64 KiB each, that the seed chooses.

    Raises:
        SretError: the file cannot be read.
    """
    draw, digest = random.Random(seed), sha256()
    try:
        with open(path, "rb") as file:
            starts = max(file.seek(0, os.SEEK_END) - BLOCK_BYTES, 0) + 1
            for start in sorted(int(draw.random() * starts) for _ in range(blocks)):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    except OSError as error:
        raise SretError(f"cannot read {path}: {error.strerror}; mend or remove it", DATA) from None
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a manifest of `sret data check` says of the images of a split."""

    path: Path
    prefix: str  # of the paths in it: the folder of the split, where it was then
    rows: dict[str, tuple[str, str]]  # bytes and SHA-256 by path

    def get(self, name: str) -> tuple[str, str] | None:
        """The bytes and the SHA-256 of an image, by its name in the folder of the split."""
        return self.rows.get(f"{self.prefix}{name}")

    def sum(self, name: str) -> str:
        """The SHA-256 of an image that is in it."""
        return self.rows[f"{self.prefix}{name}"][1]


def read_manifest(path: Path, split: str) -> Manifest | None:
    """What a file says of a split; None of a CSV file that is no manifest.

    Raises:
        SretError: the file cannot be read.
    """
    rows: dict[str, tuple[str, str]] = {}
    prefix: str | None = None
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = csv.reader(file)
            heads = next(lines, [])
            if not set(heads) >= set(MANIFEST_COLUMNS):
                return None
            places = [heads.index(name) for name in MANIFEST_COLUMNS]
            for line in lines:
                name, its_split, class_name, size, digest = (line[place] for place in places)
                if its_split == split:
                    rows[name] = (size, digest)
                    # What the folder itself is called may be in it: the place of all is the first.
                    end = name.rfind(f"{split}/{class_name}") + len(split) + 1
                    if prefix is None or end < len(prefix):
                        prefix = name[:end]
    except (OSError, IndexError, csv.Error) as error:
        raise SretError(f"cannot read the manifest {path}: {error}; write it again", DATA) from None
    return Manifest(path, prefix or "", rows)
