"""One run: a model's spec and what to do with it, of the tables that a user writes."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import SretError
from sret_cli.spec.backbone import Spec
from sret_cli.spec.contents import Contents, are_known, without_places
from sret_cli.spec.train import TrainSpec

Table = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One spec and what to do with it; `train` is None where the model is measured only.

    `continues` is the id of a run of fewer epochs that this one goes on from: since its first
    epochs had another schedule, it is not the run that has all its epochs from the start.
    `contents` tells what it reads (`identify.Identifier` finds out); None is not yet known.
    """

    study: str
    name: str
    model: Spec
    train: TrainSpec | None = None
    continues: str | None = None
    contents: Contents | None = field(default=None, compare=False)

    @property
    def is_identified(self) -> bool:
        """Whether the contents of what the run reads are known, so that it has an id."""
        if self.train is None or self.contents is not None:
            return True
        train = self.train.model_dump()
        return train["teacher"] is None and are_known(train, Contents())

    @property
    def run_id(self) -> str:
        """The first 10 hex digits of the SHA-256 of the canonical JSON of what the run does.

        How it handles what goes wrong (`records.HANDLING`) has no part in it, nor have later fields
        at the value that changes nothing (`records.LATER_FIELDS`); of images, weights and labels
        the contents have, not the places where they lie.
        """
        assert self.is_identified, "find out first what the run reads"
        spec = self.spec()
        spec.pop("contents", None)
        if spec["train"] is not None:
            spec["train"] = without_places(spec["train"], self.contents or Contents()) | HANDLING
        for table in ("model", "train"):
            if spec[table] is not None:
                spec[table] = {k: v for k, v in spec[table].items() if not is_later_default(k, v)}
        text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def spec(self) -> Table:
        """The resolved model and training, and the contents of what it reads, as plain values."""
        train = None if self.train is None else self.train.model_dump(mode="json")
        spec: Table = {"model": self.model.model_dump(mode="json"), "train": train}
        if self.continues is not None:
            spec["continues"] = self.continues
        if self.contents is not None and self.contents != Contents():
            spec["contents"] = self.contents.table()
        return spec

    def directory(self, root: Path) -> Path:
        """Where the run keeps its files under a root of runs."""
        return root / self.study / self.run_id


def flat(prefix: str, table: Table) -> Table:
    """The columns of a table: `model.recursions`, and of tables in it `model.timm_args.depth`."""
    columns: Table = {}
    for key, value in table.items():
        name = f"{prefix}.{key}"
        columns |= flat(name, value) if isinstance(value, dict) else {name: value}
    return columns


def put(table: Table, name: str, value: Any) -> None:
    """Sets a field of a table, or with `timm_args.depth` of the table in it."""
    outer, dot, inner = name.partition(".")
    if not dot:
        table[name] = value
        return
    if not isinstance(table.get(outer, {}), dict):
        raise SretError(f"{outer} = {table[outer]!r}: write it as a table")
    table[outer] = {**table.get(outer, {}), inner: value}


Row = dict[str, Any]


# Of a training: how it handles what goes wrong, which does not make it another one.
HANDLING = {"on_bad_image": "stop"}


# Fields of a model or a training that came later, and their values that change nothing: with these
# they are no part of a run's id, and configs that lack them are the same.
LATER_FIELDS = {
    "label_column": None,
    "reset_head": False,
    "drop_path_ramp": "per_pass",
    "warmup_lr": None,
    "sched_on_updates": True,
    "model_ema_warmup": False,
}


CONFIG_FILE = "config.json"


EMA_DIRECTORY = "ema"  # of a run: its averaged weights


def is_later_default(field: str, value: Any) -> bool:
    """Whether a field came later, and has the value that changes nothing."""
    return field in LATER_FIELDS and value == LATER_FIELDS[field]


def run_directory(directory: Path) -> Path:
    """The absolute path of the run whose averaged weights a directory has, else the directory's."""
    directory = Path(os.path.abspath(directory))  # its name is the run's, also where it is "."
    parent = directory.parent
    is_averaged = directory.name == EMA_DIRECTORY and (parent / CONFIG_FILE).is_file()
    return parent if is_averaged else directory
