"""One run: a model's spec and what to do with it, of the tables that a user writes."""

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sret_cli.backbone import BackboneSpec, Spec, read_spec
from sret_cli.contents import Contents, are_known, without_places
from sret_cli.cost import fit_width, parse_quantity, twin
from sret_cli.errors import CHECKPOINT, DATA, USAGE, SretError, nearest, note_once
from sret_cli.folders import folder_classes
from sret_cli.recipe import TrainSpec, model_fields, read_train
from sret_cli.records import (
    CONFIG_FILE,
    HANDLING,
    MEASUREMENTS,
    OUTCOME,
    is_later_default,
    read_json,
)
from sret_cli.spec import ModelSpec, preset

Table = dict[str, Any]
MODEL_KEYS = ("preset", "layers", "params", "macs", "twin", *ModelSpec.model_fields)
BACKBONE_KEYS = tuple(BackboneSpec.model_fields)
DIGITS_CLASSES = 10


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

    def row(self) -> Table:
        """The part of the run's row that is known beforehand; measurements are null."""
        run_id = self.run_id if self.is_identified else None
        row: Table = {"study": self.study, "run_id": run_id, "name": self.name}
        row |= flat("model", self.spec()["model"])
        if self.train is not None:
            row |= {f"train.{k}": v for k, v in self.spec()["train"].items()}
        if self.continues is not None:
            row["continues"] = self.continues
        row |= {} if self.contents is None else self.contents.table()
        return row | dict.fromkeys((*MEASUREMENTS, *OUTCOME)) | {"layers": self.model.layers}


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


def resolve(study: str, model: Table, train: Table | None, name: str | None = None) -> Run:
    """The run that a model table and a training table stand for, every default filled in.

    The default preset is `nano` where the run trains on `digits`, else `deep`; the number of
    classes is the data's where it is not given.
    """
    if train is not None:
        _check_keys("train", train, list(TrainSpec.model_fields))
        try:
            train_spec: TrainSpec | None = TrainSpec(**train)
        except SretError as error:
            raise SretError(f"[train] {error}", error.code) from None
        for field, value in TrainSpec.fitted(train).items():
            given = "epochs" if field == "warmup_epochs" else "lr"
            note_once(f"{field} is set to {value:g} to fit {given} = {train[given]:g}")
    else:
        train_spec = None
    trains_digits = train_spec is not None and train_spec.dataset == "digits"
    chosen = model.get("backbone") or model.get("preset", "nano" if trains_digits else "deep")
    classes = dataset_classes(train_spec) if train_spec is not None else None
    if classes is not None and "num_classes" not in model:
        model = model | {"num_classes": classes}
    if train_spec is not None:
        model = model_fields(train_spec.recipe, str(chosen), "backbone" in model) | model
    spec = resolve_model(model if "backbone" in model else {**model, "preset": chosen})
    if classes is not None and spec.num_classes < classes:
        raise SretError(
            f"num_classes = {spec.num_classes} is fewer than the {classes} classes of the data; "
            "leave it out to take the data's"
        )
    twinned = f" twin {model['twin']}" if "twin" in model else ""
    return Run(study, name or f"{chosen}{twinned}", spec, train_spec)


def resolve_model(table: Table) -> Spec:
    """The spec of a `[model]` table: of a backbone where it has one."""
    return _resolve_backbone(table) if "backbone" in table else resolve_sret(table)


def resolve_sret(table: Table) -> ModelSpec:
    """The spec of a `[model]` table without a backbone.

    Beside a `ModelSpec`'s fields it takes `preset`, `layers` (as `--layers`), and single numbers
    for `slices` and `recursive_slices`, which fit each stage (as `--slices`). `params` or `macs`
    then sets the width (as `--params`), and `twin` gives the control of all that (as `--twin`).
    """
    if "share" in table:
        raise SretError("[model] share ties the blocks of timm's models; give a backbone with it")
    if "timm_args" in table:
        raise SretError("[model] timm_args are of timm's models; give a backbone with them")
    _check_keys("model", table, list(MODEL_KEYS))
    try:
        values = dict(table)
        base = preset(values.pop("preset", "deep"))
        layers = _whole_number(values, "layers") if "layers" in values else None
        budget = {k: parse_quantity(values.pop(k)) for k in ("params", "macs") if k in values}
        kind = values.pop("twin", None)
        fits = {
            key: _whole_number(values, key)
            for key in ("slices", "recursive_slices")
            if key in values and not isinstance(values[key], list | tuple)
        }
        if "slices" in fits and "recursive_slices" not in table:
            fits["recursive_slices"] = fits["slices"]
        # One slice fits any stage: the numbers wanted are fitted once the tokens are known.
        spec = base.with_values(**values, **dict.fromkeys(fits, 1))
        spec = spec.with_values(**{key: spec.fit_slices(wanted) for key, wanted in fits.items()})
        spec = spec if layers is None else spec.at(layers=layers)
        spec = fit_width(spec, **budget) if budget else spec
        return spec if kind is None else twin(spec, kind)
    except SretError as error:
        raise SretError(f"[model] {error}", error.code) from None


def _resolve_backbone(table: Table) -> BackboneSpec:
    for key in table:
        if key in MODEL_KEYS and key not in BACKBONE_KEYS:
            raise SretError(f"[model] {key} does not go with a backbone; leave one of the two out")
    _check_keys("model", table, list(BACKBONE_KEYS))
    try:
        return BackboneSpec(**table)
    except SretError as error:
        raise SretError(f"[model] {error}", error.code) from None


def _whole_number(table: Table, key: str) -> int:
    value = table.pop(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SretError(f"{key} = {value!r}: give one whole number for the whole model")
    return value


def _check_keys(place: str, table: Table, keys: list[str]) -> None:
    for key in table:
        if key not in keys:
            raise SretError(f"[{place}] unknown key {key!r}; {nearest(key, keys)}")


def dataset_classes(train: TrainSpec) -> int | None:
    """How many classes a run's data has; None where it has as many as the model.

    Raises:
        SretError: the data are missing or hold fewer than two classes.
    """
    if train.dataset == "synthetic":
        return None
    if train.dataset == "digits":
        return DIGITS_CLASSES
    if train.dataset == "folder":
        return len(folder_classes(Path(train.data_dir or "")))
    if train.dataset == "wds":
        from sret_cli.streams import find_shards

        return find_shards(str(train.data_dir), True, train.label_column).classes
    from sret_cli.readers import named_source

    source = named_source(train.dataset, train.data_dir, True, train.label_column)
    return len(source.classes)


def continued(
    directory: Path,
    epochs: int | None,
    on_bad_image: str | None = None,
    places: Table | None = None,
) -> Run:
    """The run of a directory; with more epochs a new run that goes on from it, beside it.

    Nothing but its `config.json` has to be there.

    Args:
        directory: the run's.
        epochs: of the new run; as many as before, and the same run, if None.
        on_bad_image: may be another than before.
        places: where its images, weights or labels lie now, by the fields of the training.

    Raises:
        SretError: it is no run that trains, has as many epochs already, or the places are others
            than of what it reads.
    """
    directory = Path(os.path.abspath(directory))  # its name is the run's, also where it is "."
    config = read_json(directory / CONFIG_FILE)
    try:
        model, train = read_spec(config["model"]), read_train(config["train"])
        train = train.with_values(on_bad_image=on_bad_image or train.on_bad_image)
        contents = Contents.of(config.get("contents"))
        run = Run(config["study"], config["name"], model, train, config.get("continues"), contents)
    except (KeyError, TypeError) as error:
        raise SretError(f"{directory} is no run that trains: {error}", DATA) from None
    if not are_known(train.model_dump(), contents):
        raise SretError(
            f"{directory}/config.json does not say which images, weights and labels the run reads: "
            "an earlier version wrote it; start the run over",
            CHECKPOINT,
        )
    if run.run_id != directory.name or run.study != directory.parent.name:
        raise SretError(
            f"{directory}/config.json is of {run.study}/{run.run_id}: it was changed, or moved; "
            "put it back",
            CHECKPOINT,
        )
    if places:
        train = train.with_values(**places)
        moved = replace(run, train=train)
        if moved.run_id != run.run_id:
            raise SretError(
                f"--resume goes on with what {directory}/config.json says; leave out "
                f"{', '.join(places)}, of which the run reads nothing or another kind",
                USAGE,
            )
        run = moved
    if epochs is None or epochs == train.epochs:
        return run
    if epochs < train.epochs:
        raise SretError(f"{directory} is a run of {train.epochs} epochs; give more than that")
    return replace(run, train=train.with_values(epochs=epochs), continues=directory.name)
