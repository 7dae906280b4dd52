"""Turns the tables that a user writes into a run with every default filled in."""

import os
from dataclasses import replace
from pathlib import Path

from sret_cli.cost.budget import fit_width, twin_spec
from sret_cli.data.classes import dataset_classes
from sret_cli.runtime.errors import (
    CHECKPOINT,
    DATA,
    USAGE,
    SretError,
    nearest_choice,
    show_note_once,
)
from sret_cli.runtime.files import read_json
from sret_cli.spec.backbone import BackboneSpec, Spec, read_spec
from sret_cli.spec.contents import Contents, are_known
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import preset
from sret_cli.spec.quantity import parse_quantity
from sret_cli.spec.run import BASELINE, CONFIG_FILE, SHARED, Run, Table, twin_role
from sret_cli.spec.train import TrainSpec, model_fields, read_train

MODEL_KEYS = ("preset", "layers", "params", "macs", "twin", *ModelSpec.model_fields)


BACKBONE_KEYS = tuple(BackboneSpec.model_fields)


def resolve_run(
    study: str,
    model: Table,
    train: Table | None,
    name: str | None = None,
    known_classes: int | None = None,
) -> Run:
    """The run of a `[model]` and a `[train]` table, with every default filled in.

    The default preset is `nano` for training on `digits`, else `deep`. The default number of
    classes is that of the data, which are not looked at if it is known.
    """
    if train is not None:
        _check_keys("train", train, list(TrainSpec.model_fields))
        try:
            train_spec: TrainSpec | None = TrainSpec(**train)
        except SretError as error:
            raise SretError(f"[train] {error}", error.code) from None
        for field, value in TrainSpec.fitted(train).items():
            given = "epochs" if field == "warmup_epochs" else "lr"
            show_note_once(f"{field} is set to {value:g} to fit {given} = {train[given]:g}")
    else:
        train_spec = None
    trains_digits = train_spec is not None and train_spec.dataset == "digits"
    chosen = model.get("backbone") or model.get("preset", "nano" if trains_digits else "deep")
    classes = known_classes
    if train_spec is not None and known_classes is None:
        classes = dataset_classes(train_spec)
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
    role = SHARED
    if spec.is_timm and spec.untouched:
        role = BASELINE
    elif "twin" in model:
        role, chosen = twin_role(model["twin"]), f"{chosen} {twin_role(model['twin'])}"
    return Run(study, name or str(chosen), spec, train_spec, role=role)


def resolve_model(table: Table) -> Spec:
    """The spec of a `[model]` table: a `BackboneSpec` if it has a backbone, else a `ModelSpec`."""
    return _resolve_backbone(table) if "backbone" in table else resolve_sret(table)


def resolve_sret(table: Table) -> ModelSpec:
    """The spec of a `[model]` table without a backbone.

    Besides the fields of `ModelSpec` it takes `preset`, `layers` (as `--layers`), and single
    numbers for `slices` and `recursive_slices`, which are fitted to each stage (as `--slices`).
    `params` or `macs` then sets the width (as `--params`), and `twin` replaces the result by its
    control (as `--twin`).
    """
    if "share" in table:
        raise SretError("[model] share ties blocks of timm models; also give a backbone")
    if "timm_args" in table:
        raise SretError("[model] timm_args are for timm models; also give a backbone")
    _check_keys("model", table, list(MODEL_KEYS))
    try:
        values = dict(table)
        base = preset(values.pop("preset", "deep"))
        layers = _whole_number(values, "layers") if "layers" in values else None
        budget = {k: parse_quantity(values.pop(k)) for k in ("params", "macs") if k in values}
        kind = values.pop("twin", None)
        spec = base.with_fitted(**values)
        spec = spec if layers is None else spec.at(layers=layers)
        spec = fit_width(spec, **budget) if budget else spec
        return spec if kind is None else twin_spec(spec, kind)
    except SretError as error:
        raise SretError(f"[model] {error}", error.code) from None


def _resolve_backbone(table: Table) -> BackboneSpec:
    for key in table:
        if key in MODEL_KEYS and key not in BACKBONE_KEYS:
            raise SretError(
                f"[model] {key} cannot be combined with a backbone; leave one of the two out"
            )
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
            raise SretError(f"[{place}] unknown key {key!r}; {nearest_choice(key, keys)}")


def continue_run(
    directory: Path,
    epochs: int | None,
    on_bad_image: str | None = None,
    places: Table | None = None,
) -> Run:
    """The run of a directory, or with more epochs a new run that continues it.

    Only `config.json` has to exist in the directory.

    Args:
        directory: the directory of the run.
        epochs: epochs of the new run; if None, the same run with the same number.
        on_bad_image: replaces the run's value.
        places: new paths of its images, weights or labels, by field of the training.

    Raises:
        SretError: the directory holds no training, it has as many epochs already, or the places
            are not of a kind that it reads.
    """
    directory = Path(os.path.abspath(directory))  # so that "." has the name of the run
    config = read_json(directory / CONFIG_FILE)
    try:
        model, train = read_spec(config["model"]), read_train(config["train"])
        train = train.with_values(on_bad_image=on_bad_image or train.on_bad_image)
        contents = Contents.of(config.get("contents"))
        run = Run(config["study"], config["name"], model, train, config.get("continues"), contents)
    except (KeyError, TypeError) as error:
        raise SretError(f"{directory} is not a training run: {error}", DATA) from None
    if not are_known(train.model_dump(), contents):
        raise SretError(
            f"{directory}/config.json does not record which images, weights and labels the run "
            "reads, because an earlier version wrote it; start the run again in an empty directory",
            CHECKPOINT,
        )
    if run.run_id != directory.name or run.study != directory.parent.name:
        raise SretError(
            f"{directory}/config.json belongs to {run.study}/{run.run_id}: it was changed or "
            "moved; restore it",
            CHECKPOINT,
        )
    if places:
        train = train.with_values(**places)
        moved = replace(run, train=train)
        if moved.run_id != run.run_id:
            raise SretError(
                f"--resume continues what {directory}/config.json describes; leave out "
                f"{', '.join(places)}, because the run reads nothing or another kind there",
                USAGE,
            )
        run = moved
    if epochs is None or epochs == train.epochs:
        return run
    if epochs < train.epochs:
        raise SretError(f"{directory} has {train.epochs} epochs; give a larger number")
    return replace(run, train=train.with_values(epochs=epochs), continues=directory.name)
