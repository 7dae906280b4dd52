"""One run: the spec of a model, and of its training if there is one."""

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import SretError
from sret_cli.spec.backbone import Spec
from sret_cli.spec.contents import Contents, are_known, without_places
from sret_cli.spec.train import TrainSpec

Table = dict[str, Any]
SHARED, BASELINE = "shared", "baseline"  # roles; the others are `twin_role(kind)`


def twin_role(kind: str) -> str:
    """The role of a twin of a kind: "twin layers"."""
    return f"twin {kind}"


@dataclass(frozen=True)
class Run:
    """One model and what to do with it; `train` is None if the model is only measured.

    `continues` is the id of a run with fewer epochs that this one continues. The first epochs had
    another schedule, so this is a different run from one with all epochs from the start. `contents`
    are the sums of what the run reads (`identify.Identifier` computes them); None: not yet known.
    `role` says what a run is for in a study: "shared" (the question), "twin layers", "twin params",
    "twin macs" (controls without sharing) or "baseline" (an unchanged timm model). `twin_of` are
    the runs that a twin is the control of. Neither is part of the run's id.
    """

    study: str
    name: str
    model: Spec
    train: TrainSpec | None = None
    continues: str | None = None
    contents: Contents | None = field(default=None, compare=False)
    role: str = field(default=SHARED, compare=False)
    twin_of: "tuple[Run, ...]" = field(default=(), compare=False)

    @property
    def twin_of_ids(self) -> str:
        """The ids of the runs that this one is a twin of, with spaces between.

        They read the same images as the twin.
        """
        assert self.is_identified
        return " ".join(replace(run, contents=self.contents).run_id for run in self.twin_of)

    @property
    def is_identified(self) -> bool:
        """Whether the contents of all that the run reads are known, so that it has an id."""
        if self.train is None or self.contents is not None:
            return True
        train = self.train.model_dump()
        return train["teacher"] is None and are_known(train, Contents())

    @property
    def run_id(self) -> str:
        """The first 10 hex digits of the SHA-256 of the canonical JSON of what the run does.

        Images, weights and labels count with their contents, not with their paths. Fields of
        `HANDLING` do not count, nor fields of `LATER_FIELDS` with the values listed there.
        """
        assert self.is_identified, "the contents of what the run reads must be known first"
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
        """The resolved model and training, and the sums of what the run reads, as plain values."""
        train = None if self.train is None else self.train.model_dump(mode="json")
        spec: Table = {"model": self.model.model_dump(mode="json"), "train": train}
        if self.continues is not None:
            spec["continues"] = self.continues
        if self.contents is not None and self.contents != Contents():
            spec["contents"] = self.contents.table()
        return spec

    def directory(self, root: Path) -> Path:
        """The directory of the run's files, below the root directory of all runs."""
        return root / self.study / self.run_id


def flat(prefix: str, table: Table) -> Table:
    """The columns of a table and of tables in it: `model.recursions`, `model.timm_args.depth`."""
    columns: Table = {}
    for key, value in table.items():
        name = f"{prefix}.{key}"
        columns |= flat(name, value) if isinstance(value, dict) else {name: value}
    return columns


def put(table: Table, name: str, value: Any) -> None:
    """Sets a field of a table; `timm_args.depth` is a field of the table `timm_args` in it."""
    outer, dot, inner = name.partition(".")
    if not dot:
        table[name] = value
        return
    if not isinstance(table.get(outer, {}), dict):
        raise SretError(f"{outer} = {table[outer]!r}: write it as a table")
    table[outer] = {**table.get(outer, {}), inner: value}


Row = dict[str, Any]


# Fields of a training that say how it handles failures; a run with other values is the same run.
HANDLING = {"on_bad_image": "stop"}


# Fields of a model or a training that were added later, each with the value that changes nothing.
# With these values they are not part of a run's id, and configs without the fields are the same.
LATER_FIELDS = {
    "label_column": None,
    "reset_head": False,
    "drop_path_ramp": "per_pass",
    "warmup_lr": None,
    "sched_on_updates": True,
    "model_ema_warmup": False,
}


CONFIG_FILE = "config.json"


EMA_DIRECTORY = "ema"  # in a run's directory, with its averaged weights


def is_later_default(field: str, value: Any) -> bool:
    """Whether a field was added later, and has the value that changes nothing."""
    return field in LATER_FIELDS and value == LATER_FIELDS[field]


def run_directory(directory: Path) -> Path:
    """The absolute path of a run: the parent of a directory of averaged weights, else itself."""
    directory = Path(os.path.abspath(directory))  # "." becomes the name of the run
    parent = directory.parent
    is_averaged = directory.name == EMA_DIRECTORY and (parent / CONFIG_FILE).is_file()
    return parent if is_averaged else directory
