"""Which images a data set has, wherever it lies.

Of all images the names, classes and sizes are compared; the bytes of `SAMPLED` of each split, which
the seed chooses; and, where a manifest of `sret data check` lies with a folder of images, the
SHA-256 of all of them, as it has them. `images.json` keeps enough of that to name what differs.
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
    Image,
    Manifest,
    list_images,
    pixels_in_memory,
    read_image,
    read_manifest,
    sum_of_blocks,
)
from sret_cli.data.soft_labels import StoredLabels
from sret_cli.data.sources import Listed, Source
from sret_cli.data.streams import Shards
from sret_cli.runtime.errors import CHECKPOINT, DATA, SretError
from sret_cli.runtime.files import read_json, write_json

SAMPLED = 256  # images of a split, or blocks of its shards, whose bytes are compared
IMAGES_FILE = "images.json"
UNREAD = "unreadable"  # in the place of a sum


@dataclass(frozen=True)
class Fingerprint:
    """What tells the images of a split from others, and what names the first that differs.

    `files` is the SHA-256 of all names, classes and sizes, `sample` of the bytes of some images,
    `manifest` of the sums in a manifest. `classes` has the number of images of each class and the
    first digits of its own `files` and `manifest`, `sampled` the size and sum of each image that
    was read.
    """

    files: str
    sample: str
    manifest: str | None
    classes: dict[str, list[Any]]
    sampled: dict[str, list[Any]]

    @property
    def sha256(self) -> str:
        """The sum of both: names, classes and sizes of all, and the bytes of some."""
        return sha256(f"{self.files} {self.sample}".encode()).hexdigest()


class Images:
    """The images of a split, to be compared with others; they are looked at where that is asked.

    Args:
        found: the images, or the shards that have them.
        data_dir: the folder that was named, where a manifest may be.
        skips: whether images that cannot be read are left out of the training.
    """

    def __init__(
        self, found: Source | Shards, data_dir: str | None = None, skips: bool = False
    ) -> None:
        self.found, self.skips = found, skips
        self.known: dict[int, Fingerprint] = {}
        images = found.images if isinstance(found, Source) else None
        self.in_folder = isinstance(images, Listed) and isinstance(images.images[0], str)
        self.folder = Path(data_dir) if data_dir is not None and self.in_folder else None

    @cached_property
    def listed(self) -> list[Image]:
        """All images, sorted by their classes and names."""
        return list_images(self.found)

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest that lies with the images, the first by its name."""
        if self.folder is None or not isinstance(self.found, Source):
            return None
        split = Path(self.found.name).name
        found = (read_manifest(path, split) for path in sorted(self.folder.glob("*.csv")))
        return next((manifest for manifest in found if manifest is not None), None)

    def fingerprint(self, seed: int) -> Fingerprint:
        """What tells these images from others, with the bytes of those that a seed chooses.

        Raises:
            SretError: an image cannot be read, or is not what the manifest says.
        """
        if seed not in self.known:
            self.known[seed] = self._fingerprint(seed)
        return self.known[seed]

    def _fingerprint(self, seed: int) -> Fingerprint:
        sampled = {image.name: [image.size, self._sum(image, seed)] for image in self._chosen(seed)}
        self._refuse_other_than_manifest(sampled)
        files, sums = sha256(), sha256()
        classes: dict[str, list[Any]] = {}
        for name, images in groupby(self.listed, key=attrgetter("class_name")):
            count, own, own_sums = 0, sha256(), sha256()
            for image in images:
                count += 1
                own.update(_bytes(f"{image.name}\0{image.size}\n"))
                if self.manifest is not None:
                    own_sums.update(_bytes(f"{image.name}\0{self.manifest.sum(image.name)}\n"))
            files.update(_bytes(f"{name}\0{count}\0{own.hexdigest()}\n"))
            sums.update(_bytes(f"{name}\0{own_sums.hexdigest()}\n"))
            in_manifest = None if self.manifest is None else own_sums.hexdigest()[:16]
            classes[name] = [count, own.hexdigest()[:16], in_manifest]
        sample = "".join(f"{name}\0{digest}\n" for name, (_, digest) in sampled.items())
        return Fingerprint(
            files=files.hexdigest(),
            sample=sha256(_bytes(sample)).hexdigest(),
            manifest=None if self.manifest is None else sums.hexdigest(),
            classes=classes,
            sampled=sampled,
        )

    def difference(self, stored: Fingerprint, seed: int, split: str) -> str | None:
        """How these images are others than some before, in words; None where they are the same."""
        now = self.fingerprint(seed)
        if (now.files, now.sample) == (stored.files, stored.sample):
            return self._manifest_difference(stored, now, split)
        if now.files == stored.files:
            differ = (n for n, value in now.sampled.items() if stored.sampled.get(n) != value)
            return f"{_place(split, next(differ, ''))} has other bytes"
        sizes = {image.name: image.size for image in self.listed}
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
        return f"names or sizes of images in {_place(split, next(differ, ''))} are others"

    def _manifest_difference(self, stored: Fingerprint, now: Fingerprint, split: str) -> str | None:
        if None in (stored.manifest, now.manifest) or stored.manifest == now.manifest:
            return None
        names = (n for n, v in now.classes.items() if v[2] != stored.classes.get(n, v)[2])
        where = _place(split, next(names, ""))
        return f"the manifest has other SHA-256 of images in {where} than before"

    def _chosen(self, seed: int) -> list[Image]:
        """The images whose bytes are compared: all that are in memory, else `SAMPLED`.

        Of `random` only the seeding and `random()` are promised to stay as they are.
        """
        count, draw = len(self.listed), random.Random(seed)
        if (
            count <= SAMPLED
            or isinstance(self.found, Shards)
            or pixels_in_memory(self.found) is not None
        ):
            return self.listed
        places: dict[int, None] = {}
        while len(places) < SAMPLED:
            places[int(draw.random() * count)] = None
        return [self.listed[place] for place in sorted(places)]

    def _sum(self, image: Image, seed: int) -> str:
        """The SHA-256 of the bytes of an image; of one that is to be skipped, a word."""
        if isinstance(self.found, Shards):
            blocks = -(-SAMPLED // len(self.found.paths))
            return sum_of_blocks(self.found.paths[image.place], blocks, seed)
        try:
            return sha256(read_image(self.found, image.place)).hexdigest()
        except UNREADABLE as error:
            if self.skips:
                return UNREAD
            raise unreadable_error(self.found.filename(image.place), error) from None

    def _refuse_other_than_manifest(self, sampled: dict[str, list[Any]]) -> None:
        """Makes sure that all images are in the manifest, and are what it says of them.

        Raises:
            SretError: one is not, or has another size, or bytes where these were read.
        """
        if self.manifest is None or not isinstance(self.found, Source):
            return
        path = self.manifest.path
        for image in self.listed:
            said = self.manifest.get(image.name)
            _, digest = sampled.get(image.name, (0, UNREAD))
            if said is None:
                wrong = "it is not in it"
            elif said[0] and said[0] != str(image.size):
                wrong = f"it has {image.size:,} bytes, not {said[0]}"
            elif said[1] and digest not in (UNREAD, said[1]):
                wrong = "its SHA-256 is another"
            else:
                continue
            raise SretError(
                f"{self.found.filename(image.place)} is not as {path} says: {wrong}; put the file "
                f"back, or run `sret data check {self.folder} --manifest {path}` again",
                DATA,
            )


def _bytes(text: str) -> bytes:
    """A text in which names of files need not be UTF-8."""
    return text.encode(errors="surrogateescape")


def _place(split: str, name: str) -> str:
    """A class or an image in a split, as messages have it."""
    return f"{split}/{name}" if name else split


def refuse_other_labels(labels: StoredLabels, images: Images) -> None:
    """Makes sure that stored labels are of the images that are trained on.

    Raises:
        SretError: they are of others; the message names the first class or file that differs.
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
            f"the labels in {labels.directory} are of {spec.images:,} other images than the "
            f"{len(images.listed):,} to train on: {reason}; write some for these by "
            "`sret distill-labels`",
            DATA,
        )


def write_fingerprints(directory: Path, found: dict[str, Fingerprint]) -> None:
    """Writes what names the images that differ later; a manifest's sums stay once they are known.

    Raises:
        SretError: the directory cannot be written to, or the disk is full.
    """
    stored = read_fingerprints(directory)
    kept = {
        split: stored[split] if one.manifest is None and split in stored else one
        for split, one in found.items()
    }
    if kept and kept != stored:
        write_json(directory / IMAGES_FILE, {split: asdict(one) for split, one in kept.items()})


def read_fingerprints(directory: Path) -> dict[str, Fingerprint]:
    """The fingerprints that a directory keeps, by split; none where there are none or others."""
    path = directory / IMAGES_FILE
    if not path.exists():
        return {}
    try:
        return {split: Fingerprint(**values) for split, values in read_json(path).items()}
    except (AttributeError, TypeError) as error:
        raise SretError(f"{path} is damaged ({error}); remove it", CHECKPOINT) from None
