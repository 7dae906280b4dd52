"""What a run reads, identified by its contents and not by its path."""

from dataclasses import asdict, dataclass
from typing import Any

from sret_cli.spec.dataset import has_stored_images

# The fields of a training that are paths, and the keys of a config and a row with the sums of what
# is there. `teacher` is a path if it is a directory, and not the name of a timm model.
CONTENTS_OF = {
    "data_dir": ("data_files_sha256", "data_sample_sha256"),
    "init": ("init_sha256",),
    "teacher": ("teacher_sha256",),
    "teacher_checkpoint": ("teacher_checkpoint_sha256",),
    "soft_labels": ("soft_labels_sha256",),
}
WHAT = {
    "data_files_sha256": "images",
    "data_sample_sha256": "images",
    "init_sha256": "weights of train.init",
    "teacher_sha256": "teacher's weights",
    "teacher_checkpoint_sha256": "teacher's weights",
    "soft_labels_sha256": "soft labels",
}


@dataclass(frozen=True)
class Contents:
    """SHA-256 sums of what a training reads; None for what it does not read.

    `data_files_sha256` covers the names, classes and sizes of all images, `data_sample_sha256` the
    bytes of a sample that the seed chooses (`fingerprint.Images`). The others cover weights, the
    design of a teacher, and the records of soft labels.
    """

    data_files_sha256: str | None = None
    data_sample_sha256: str | None = None
    init_sha256: str | None = None
    teacher_sha256: str | None = None
    teacher_checkpoint_sha256: str | None = None
    soft_labels_sha256: str | None = None

    @classmethod
    def of(cls, table: Any) -> "Contents":
        """The sums in the table `contents` of a `config.json`; ignores other keys and values."""
        known = table if isinstance(table, dict) else {}
        return cls(**{key: known[key] for key in WHAT if isinstance(known.get(key), str)})

    def table(self) -> dict[str, str]:
        """The sums that are not None, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def differences(self, other: "Contents") -> list[str]:
        """What differs between the contents of two runs, in words, each once."""
        mine, theirs = asdict(self), asdict(other)
        return list(dict.fromkeys(WHAT[key] for key in WHAT if mine[key] != theirs[key]))


def are_known(train: dict[str, Any], contents: Contents) -> bool:
    """Whether `contents` has the sums of all that a training reads."""
    sums = contents.table()
    places = [place for place in CONTENTS_OF if place != "teacher" and train[place] is not None]
    if has_stored_images(train["dataset"]):
        places.append("data_dir")
    return all(key in sums for place in places for key in CONTENTS_OF[place])


def without_places(train: dict[str, Any], contents: Contents) -> dict[str, Any]:
    """The fields of a training, with sums of contents instead of paths.

    Other fields stay the same. `hfds/NAME` becomes `hfds`, since a folder can be named either way.
    """
    train, sums = dict(train), contents.table()
    for place, keys in CONTENTS_OF.items():
        if found := [sums[key] for key in keys if key in sums]:
            train[place] = " ".join(found)
    if train["dataset"].startswith("hfds/"):
        train["dataset"] = "hfds"
    return train
