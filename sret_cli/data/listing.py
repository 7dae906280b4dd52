"""Lists every image of a dataset by class, name and size without decoding it; reads its bytes."""

import os
import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from sret_cli.data.decode import decode_image
from sret_cli.data.sources import Listed, Source, TorchvisionImages
from sret_cli.data.streams import Shards
from sret_cli.runtime.errors import DATA, SretError

BLOCK_BYTES = 65_536
UNKNOWN_SIZE = -1  # of a file that cannot be accessed


class Entry(NamedTuple):
    """An image as it is compared; `place` is its index in the source. Of shards, a shard."""

    class_name: str
    name: str
    size: int
    place: int


def list_entries(source: Source | Shards) -> list[Entry]:
    """All images, sorted by class and name; of shards, the shards."""
    return sorted(_entries(source))


def _entries(source: Source | Shards) -> Iterator[Entry]:
    if isinstance(source, Shards):
        for index, (path, samples) in enumerate(zip(source.paths, source.samples, strict=True)):
            yield Entry("", f"{os.path.basename(path)} of {samples:,} samples", _size(path), index)
    elif isinstance(source.images, Listed):
        yield from _entries_of_list(source, source.images)
    elif isinstance(source.images, TorchvisionImages):
        yield from _entries_of_torchvision(source, source.images)
    elif isinstance(source.images, ReaderImageInTar):
        yield from _entries_of_tar(source, source.images)
    else:
        yield from _entries_of_hugging_face(source, source.images)


def _class_name(source: Source, label: int | str) -> str:
    """The class of a label as it is in the data: a name, or a number that may be renumbered."""
    if isinstance(label, str):
        return label
    return source.classes[source.numbers[label] if source.numbers else label]


def _entries_of_list(source: Source, images: Listed) -> Iterator[Entry]:
    root = f"{source.name}{os.sep}"
    for index, (image, target) in enumerate(zip(images.images, images.targets, strict=True)):
        class_name = _class_name(source, target)
        if isinstance(image, str):
            yield Entry(class_name, image.removeprefix(root), _size(image), index)
        else:
            yield Entry(class_name, str(index), image.nbytes, index)


def _entries_of_torchvision(source: Source, images: TorchvisionImages) -> Iterator[Entry]:
    paths, targets, pixels = images.paths, images.targets, images.pixels
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    for index in range(len(source)):
        target = targets[index] if targets is not None else -1
        is_known = 0 <= target < len(source.classes)
        class_name = _class_name(source, target) if is_known else str(target)
        if paths:
            name = os.path.relpath(paths[index], root or ".")
            yield Entry(class_name, name, _size(paths[index]), index)
        else:
            size = 0 if pixels is None else pixels[index].nbytes
            yield Entry(class_name, str(index), size, index)


def _entries_of_tar(source: Source, reader: ReaderImageInTar) -> Iterator[Entry]:
    for index, (member, *outer) in enumerate(reader.samples):
        parents = (getattr(part, "name", part) for part in outer if part)  # TarInfo or str
        name = "/".join([*parents, member.name])
        yield Entry(_class_name(source, reader.targets[index]), name, member.size, index)


def _entries_of_hugging_face(source: Source, reader: Any) -> Iterator[Entry]:
    """The entries of a `ReaderHfds`; the index is part of the name, since rows have no path."""
    from pyarrow import compute

    index = 0
    for table in reader.dataset.with_format("arrow").iter(10_000):
        images = table[reader.image_key]
        sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
        paths = compute.struct_field(images, "path").to_pylist()
        targets = table[reader.label_key].to_pylist()
        for path, size, target in zip(paths, sizes, targets, strict=True):
            name = f"{index} {os.path.basename(path or '')}"
            size = size if size is not None else _size(path or "")
            yield Entry(_class_name(source, target), name, size, index)
            index += 1


def split_folder(source: Source | Shards) -> str | None:
    """The folder of a split whose images are single files in it, else None."""
    if isinstance(source, Source) and isinstance(source.images, Listed):
        return source.name if isinstance(source.images.images[0], str) else None
    return None


def is_read_completely(source: Source | Shards) -> bool:
    """Whether a fingerprint reads all images (those in memory) or all shards, not a sample."""
    return isinstance(source, Shards) or _pixels_in_memory(source) is not None


def entry_sum(source: Source | Shards, index: int, seed: int, blocks: int) -> str:
    """The SHA-256 of an image's bytes; of a shard, of some blocks of 64 KiB that the seed chooses.

    `blocks` is the number of blocks of all shards together.

    Raises:
        SretError: a shard cannot be read.
        OSError and others of `decode.UNREADABLE`: an image cannot be read.
    """
    if isinstance(source, Shards):
        return _sum_of_blocks(source.paths[index], -(-blocks // len(source.paths)), seed)
    return sha256(_image_bytes(source, index)).hexdigest()


def _pixels_in_memory(source: Source) -> Any:
    """All images `[N, …]` if they are arrays in memory, else None."""
    images = source.images
    if isinstance(images, Listed):
        return None if isinstance(images.images[0], str) else images.images
    return images.pixels if isinstance(images, TorchvisionImages) else None


def _image_bytes(source: Source, index: int) -> Any:
    """The bytes of an image's file, or its pixels if it has no file of its own."""
    pixels = _pixels_in_memory(source)
    if pixels is not None:
        return np.ascontiguousarray(pixels[index]).data
    if isinstance(source.images, TorchvisionImages) and source.images.paths:
        return Path(source.images.paths[index]).read_bytes()
    image, _ = source.images[index]
    if isinstance(image, Image.Image | np.ndarray):
        return decode_image(image, "RGB").tobytes()
    with image:
        return image.read()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return UNKNOWN_SIZE


def _sum_of_blocks(path: str, blocks: int, seed: int) -> str:
    draw, digest = random.Random(seed), sha256()
    try:
        with open(path, "rb") as file:
            starts = max(file.seek(0, os.SEEK_END) - BLOCK_BYTES, 0) + 1
            for start in sorted(int(draw.random() * starts) for _ in range(blocks)):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    except OSError as error:
        raise SretError(f"cannot read {path}: {error.strerror}; fix or remove it", DATA) from None
    return digest.hexdigest()
