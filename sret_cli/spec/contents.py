"""What a run reads, told by what is in it and not by where it lies."""

from dataclasses import asdict, dataclass
from typing import Any

from sret_cli.spec.dataset import has_stored_images

# Of a training, the fields that say where something lies, and what tells its contents in a config
# and a row. `teacher` is such a field where it is a directory, and not a name of timm's.
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
    """SHA-256 sums of what a training reads; None of what it does not read.

    `data_files_sha256` is of the names, classes and sizes of all images, `data_sample_sha256` of
    the bytes of those that the seed chooses (`fingerprint.Images`). The others are of weights, of a
    teacher's design, and of the records of soft labels.
    """

    data_files_sha256: str | None = None
    data_sample_sha256: str | None = None
    init_sha256: str | None = None
    teacher_sha256: str | None = None
    teacher_checkpoint_sha256: str | None = None
    soft_labels_sha256: str | None = None

    @classmethod
    def of(cls, table: Any) -> "Contents":
        """The contents in a table of `config.json`; of other keys and values, nothing."""
        known = table if isinstance(table, dict) else {}
        return cls(**{key: known[key] for key in WHAT if isinstance(known.get(key), str)})

    def table(self) -> dict[str, str]:
        """The sums that there are, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def differences(self, other: "Contents") -> list[str]:
        """What two runs read of which the contents differ, in words, each once."""
        mine, theirs = asdict(self), asdict(other)
        return list(dict.fromkeys(WHAT[key] for key in WHAT if mine[key] != theirs[key]))


def are_known(train: dict[str, Any], contents: Contents) -> bool:
    """Whether the contents of all that a training reads are told."""
    told = contents.table()
    places = [place for place in CONTENTS_OF if place != "teacher" and train[place] is not None]
    if has_stored_images(train["dataset"]):
        places.append("data_dir")
    return all(key in told for place in places for key in CONTENTS_OF[place])


def without_places(train: dict[str, Any], contents: Contents) -> dict[str, Any]:
    """The fields of a training with the sums of contents for the places where they lie.

    What is at no place stays as it is. `hfds/NAME` is `hfds`: a folder can be named either way.
    """
    train, told = dict(train), contents.table()
    for place, keys in CONTENTS_OF.items():
        if found := [told[key] for key in keys if key in told]:
            train[place] = " ".join(found)
    if train["dataset"].startswith("hfds/"):
        train["dataset"] = "hfds"
    return train
