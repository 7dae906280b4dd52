"""The manifest that `sret data check` writes, as read for a split of a folder."""

import csv
from dataclasses import dataclass
from pathlib import Path

from sret_cli.runtime.errors import DATA, SretError

MANIFEST_COLUMNS = ("path", "split", "class_name", "bytes", "sha256")


@dataclass(frozen=True)
class Manifest:
    """The size and SHA-256 of each image of a split.

    `prefix` is the path of the split's folder when the manifest was written. `rows` holds the
    columns `bytes` and `sha256` by path.
    """

    path: Path
    prefix: str
    rows: dict[str, tuple[str, str]]

    def get(self, name: str) -> tuple[str, str] | None:
        """The bytes and the SHA-256 of an image, by its path in the folder of the split."""
        return self.rows.get(f"{self.prefix}{name}")

    def sum(self, name: str) -> str:
        """The SHA-256 of an image that the manifest lists."""
        return self.rows[f"{self.prefix}{name}"][1]


def read_manifest(path: Path, split: str) -> Manifest | None:
    """The manifest of a split in a CSV file; None if the file is not a manifest.

    Raises:
        SretError: the file cannot be read.
    """
    rows: dict[str, tuple[str, str]] = {}
    prefix: str | None = None
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if not set(header) >= set(MANIFEST_COLUMNS):
                return None
            places = [header.index(name) for name in MANIFEST_COLUMNS]
            for line in lines:
                name, its_split, class_name, size, digest = (line[place] for place in places)
                if its_split == split:
                    rows[name] = (size, digest)
                    # Files' names may contain the same text again: the shortest prefix is right.
                    end = name.rfind(f"{split}/{class_name}") + len(split) + 1
                    if prefix is None or end < len(prefix):
                        prefix = name[:end]
    except (OSError, IndexError, csv.Error) as error:
        raise SretError(f"cannot read the manifest {path}: {error}; write it again", DATA) from None
    return Manifest(path, prefix or "", rows)
