"""Identifies the images of a dataset by their contents, not by where they are stored.

Compared are the names, classes and sizes of all images; the bytes of `SAMPLED` images of each
split, which the seed chooses; and, if a folder of images has a manifest of `sret data check`, the
SHA-256 of all images in it. `images.json` keeps enough of this to name what differs.
"""

import random
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from sret_cli.data.decode import UNREADABLE, unreadable_error
from sret_cli.data.listing import (
    Entry,
    entry_sum,
    is_read_completely,
    list_entries,
    split_folder,
)
from sret_cli.data.manifest import Manifest, read_manifest
from sret_cli.data.soft_labels import StoredLabels
from sret_cli.data.sources import Source
from sret_cli.data.streams import Shards
from sret_cli.runtime.errors import CHECKPOINT, DATA, SretError
from sret_cli.runtime.files import read_json, write_json

SAMPLED = 256  # images of a split, or blocks of its shards, whose bytes are compared
IMAGES_FILE = "images.json"
UNREAD = "unreadable"  # in place of a SHA-256


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the images of a split, and what is needed to name the first difference.

    `files` is the SHA-256 of all names, classes and sizes; `sample` that of the bytes of some
    images; `manifest` that of the SHA-256 values in a manifest. `classes` holds, for each class,
    the number of images and the first digits of its own `files` and `manifest`; `sampled` holds the
    size and SHA-256 of each image that was read.
    """

    files: str
    sample: str
    manifest: str | None
    classes: dict[str, list[Any]]
    sampled: dict[str, list[Any]]

    @property
    def sha256(self) -> str:
        """The SHA-256 of `files` and `sample` together."""
        return sha256(f"{self.files} {self.sample}".encode()).hexdigest()


class Images:
    """The images of a split, to be compared with others; nothing is read before it is needed.

    Args:
        source: the images, or the shards that contain them.
        data_dir: the folder that the user named, where a manifest may be.
        skips: whether images that cannot be read are left out of the training.
    """

    def __init__(
        self, source: Source | Shards, data_dir: str | None = None, skips: bool = False
    ) -> None:
        self.source, self.data_dir, self.skips = source, data_dir, skips
        self._fingerprints: dict[int, Fingerprint] = {}

    @cached_property
    def entries(self) -> list[Entry]:
        """All images, sorted by class and name."""
        return list_entries(self.source)

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest in a folder of images; of several, the first by name."""
        folder = split_folder(self.source)
        if folder is None or self.data_dir is None:
            return None
        paths = sorted(Path(self.data_dir).glob("*.csv"))
        manifests = (read_manifest(path, Path(folder).name) for path in paths)
        return next((manifest for manifest in manifests if manifest is not None), None)

    def fingerprint(self, seed: int) -> Fingerprint:
        """The fingerprint of these images, with the bytes of those that a seed chooses.

        Raises:
            SretError: an image cannot be read, or is not what the manifest says.
        """
        if seed not in self._fingerprints:
            self._fingerprints[seed] = self._fingerprint(seed)
        return self._fingerprints[seed]

    def _fingerprint(self, seed: int) -> Fingerprint:
        sampled = {entry.name: [entry.size, self._sum(entry, seed)] for entry in self._chosen(seed)}
        self._refuse_other_than_manifest(sampled)
        files, sums = sha256(), sha256()
        classes: dict[str, list[Any]] = {}
        for name, entries in groupby(self.entries, key=attrgetter("class_name")):
            count, class_files, class_sums = 0, sha256(), sha256()
            for entry in entries:
                count += 1
                class_files.update(_bytes(f"{entry.name}\0{entry.size}\n"))
                if self.manifest is not None:
                    class_sums.update(_bytes(f"{entry.name}\0{self.manifest.sum(entry.name)}\n"))
            files.update(_bytes(f"{name}\0{count}\0{class_files.hexdigest()}\n"))
            sums.update(_bytes(f"{name}\0{class_sums.hexdigest()}\n"))
            in_manifest = None if self.manifest is None else class_sums.hexdigest()[:16]
            classes[name] = [count, class_files.hexdigest()[:16], in_manifest]
        sample = "".join(f"{name}\0{digest}\n" for name, (_, digest) in sampled.items())
        return Fingerprint(
            files=files.hexdigest(),
            sample=sha256(_bytes(sample)).hexdigest(),
            manifest=None if self.manifest is None else sums.hexdigest(),
            classes=classes,
            sampled=sampled,
        )

    def difference(self, stored: Fingerprint, seed: int, split: str) -> str | None:
        """How these images differ from stored ones, in words; None if they are the same."""
        now = self.fingerprint(seed)
        if (now.files, now.sample) == (stored.files, stored.sample):
            return self._manifest_difference(stored, now, split)
        if now.files == stored.files:
            differ = (n for n, value in now.sampled.items() if stored.sampled.get(n) != value)
            return f"{_place(split, next(differ, ''))} has other bytes"
        sizes = {entry.name: entry.size for entry in self.entries}
        for name, (size, _) in stored.sampled.items():
            if name not in sizes:
                return f"{_place(split, name)} is missing"
            if sizes[name] != size:
                return f"{_place(split, name)} has {sizes[name]:,} bytes, not {size:,}"
        for name in sorted({*stored.classes, *now.classes}):
            was, found = (f.classes.get(name, [0, "", None]) for f in (stored, now))
            if was[0] != found[0]:
                many = "1 image" if found[0] == 1 else f"{found[0]:,} images"
                return f"{_place(split, name)} has {many}, not {was[0]:,}"
        differ = (n for n, v in now.classes.items() if v[1] != stored.classes[n][1])
        return f"names or sizes of images in {_place(split, next(differ, ''))} differ"

    def _manifest_difference(self, stored: Fingerprint, now: Fingerprint, split: str) -> str | None:
        if None in (stored.manifest, now.manifest) or stored.manifest == now.manifest:
            return None
        names = (n for n, v in now.classes.items() if v[2] != stored.classes.get(n, v)[2])
        where = _place(split, next(names, ""))
        return f"the manifest has other SHA-256 of images in {where} than before"

    def _chosen(self, seed: int) -> list[Entry]:
        """The images whose bytes are compared: `SAMPLED`, or all if they are in memory."""
        count = len(self.entries)
        if count <= SAMPLED or is_read_completely(self.source):
            return self.entries
        draw = random.Random(seed)
        places: set[int] = set()
        while len(places) < SAMPLED:
            # Python keeps only `random()` the same in later versions, not `sample` or `randrange`.
            places.add(int(draw.random() * count))
        return [self.entries[place] for place in sorted(places)]

    def _sum(self, entry: Entry, seed: int) -> str:
        """The SHA-256 of an image's bytes; `UNREAD` for an unreadable image that is skipped."""
        try:
            return entry_sum(self.source, entry.place, seed, blocks=SAMPLED)
        except UNREADABLE as error:
            if self.skips:
                return UNREAD
            raise unreadable_error(self.source.filename(entry.place), error) from None

    def _refuse_other_than_manifest(self, sampled: dict[str, list[Any]]) -> None:
        """Raises if an image is not in the manifest or differs from its line.

        Raises:
            SretError: it is missing there, or its size or, if it was read, its SHA-256 differs.
        """
        if self.manifest is None:
            return
        path = self.manifest.path
        for entry in self.entries:
            line = self.manifest.get(entry.name)
            _, digest = sampled.get(entry.name, (0, UNREAD))
            if line is None:
                wrong = "it is not in the manifest"
            elif line[0] and line[0] != str(entry.size):
                wrong = f"it has {entry.size:,} bytes, not {line[0]}"
            elif line[1] and digest not in (UNREAD, line[1]):
                wrong = "its SHA-256 differs"
            else:
                continue
            raise SretError(
                f"{self.source.filename(entry.place)} differs from {path}: {wrong}; put the file "
                f"back, or run `sret data check {self.data_dir} --manifest {path}` again",
                DATA,
            )


def _bytes(text: str) -> bytes:
    """The bytes of a text; names of files in it need not be valid UTF-8."""
    return text.encode(errors="surrogateescape")


def _place(split: str, name: str) -> str:
    """A class or an image of a split, as messages name it."""
    return f"{split}/{name}" if name else split


def refuse_other_labels(labels: StoredLabels, images: Images) -> None:
    """Raises if stored labels belong to other images than those of the training.

    Raises:
        SretError: they do; the message names the first class or file that differs.
    """
    spec = labels.spec
    stored = read_fingerprints(labels.directory).get("train")
    if stored is not None and stored.sha256 == spec.images_sha256:
        reason = images.difference(stored, spec.seed, "train")
    else:
        same = images.fingerprint(spec.seed).sha256 == spec.images_sha256
        reason = None if same else "names, sizes or bytes differ"
    if reason is not None:
        raise SretError(
            f"the labels in {labels.directory} belong to {spec.images:,} images other than the "
            f"{len(images.entries):,} training images: {reason}; write new labels with "
            "`sret distill-labels`",
            DATA,
        )


def write_fingerprints(directory: Path, found: dict[str, Fingerprint]) -> None:
    """Writes the fingerprints of a run's images; one without a manifest does not replace another.

    Raises:
        SretError: the directory cannot be written to, or the disk is full.
    """
    stored = read_fingerprints(directory)
    kept = {
        split: stored[split] if new.manifest is None and split in stored else new
        for split, new in found.items()
    }
    if kept and kept != stored:
        write_json(directory / IMAGES_FILE, {split: asdict(one) for split, one in kept.items()})


def read_fingerprints(directory: Path) -> dict[str, Fingerprint]:
    """The stored fingerprints of a run's images, by split; an empty dict if there are none.

    Raises:
        SretError: the file is damaged.
    """
    path = directory / IMAGES_FILE
    if not path.exists():
        return {}
    try:
        return {split: Fingerprint(**values) for split, values in read_json(path).items()}
    except (AttributeError, TypeError) as error:
        raise SretError(f"{path} is damaged ({error}); remove it", CHECKPOINT) from None
