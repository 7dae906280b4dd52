"""Where a model comes from: its run or file, its classes, and how its images are prepared.

An export stores this with the weights, so that the file can be used alone. It stores no paths.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sret_cli import __version__
from sret_cli.data.augment import Pixels
from sret_cli.data.class_names import config_classes
from sret_cli.spec.backbone import Spec
from sret_cli.spec.run import Row, run_directory
from sret_cli.spec.train import TrainSpec, read_train
from sret_cli.weights.store import load_config

MAX_NAME = 80  # characters of a model's name in the name of a directory
# The fields of a training that evaluating an export needs; the data are named by --data-dir.
EVALUATION_FIELDS = ("dataset", "label_column", "interpolation", "crop_pct")


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a tensor: resized and cropped, scaled to 0..1, normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; what is not known is None or empty.

    Attributes:
        name: the name of the run or model.
        study: the study of the run.
        run_id: the id of the run.
        averaged: whether the weights are averaged ones.
        classes: names of the classes, in the order of the outputs.
        source: the file that the model was converted from.
        train: the settings of the training, as in `config.json`.
        preparation: how images are prepared.
        row: what the run measured, if it was trained.
    """

    name: str
    study: str | None = None
    run_id: str | None = None
    averaged: bool = False
    classes: tuple[str, ...] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] | None = None
    preparation: Preparation | None = None
    row: Row = field(default_factory=dict)

    @property
    def directory_name(self) -> str:
        """A name for a directory, of letters, digits, dots, dashes and underscores only.

        It contains the run's id, so that runs of the same name get different directories.
        """
        parts = (self.name, self.run_id or "", "ema" if self.averaged else "")
        return "-".join(filter(None, map(safe_name, parts))) or "model"

    def config(self) -> Row:
        """The fields of an export's `config.json` besides the spec; none is a path."""
        train = self.train or {}
        known: Row = {
            "name": self.name,
            "study": self.study,
            "run_id": self.run_id,
            "classes": None if self.classes is None else list(self.classes),
            "source": dict(self.source),
            "train": {k: train[k] for k in EVALUATION_FIELDS if train.get(k) is not None},
            "averaged": self.averaged or None,
        }
        return {key: value for key, value in known.items() if value}

    def metadata(self, spec: Spec) -> dict[str, str]:
        """The metadata of an export's file; lists and tables are written as JSON."""
        values: Row = {
            "sret_version": __version__,
            "name": self.name,
            "study": self.study,
            "run_id": self.run_id,
            "model": spec.model_dump(mode="json"),
            "img_size": spec.img_size,
            "in_chans": spec.in_chans,
            "num_classes": spec.num_classes,
            "classes": None if self.classes is None else list(self.classes),
        }
        if self.run_id is not None:
            values["weights"] = "averaged" if self.averaged else "as trained"
        values["source"] = dict(self.source) or None
        if self.preparation is not None:
            values |= vars(self.preparation)
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in values.items()
            if value is not None
        }


def safe_name(text: str) -> str:
    """A text as part of a file name; all but letters, digits, dots and underscores are dashes."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)[:MAX_NAME].strip("-.")


def read_origin(directory: Path, spec: Spec, row: Row | None = None) -> Origin:
    """The origin of a stored model.

    Args:
        directory: a run, its averaged weights (`ema`), or a built, converted or exported model.
        spec: the spec of the model.
        row: what the run measured.

    Raises:
        SretError: the directory has no model, or its `config.json` is damaged.
    """
    config, home = load_config(directory), run_directory(directory)
    train = config.get("train")
    row = row or {}
    averaged = home != Path(os.path.abspath(directory)) or bool(config.get("averaged"))
    if row.get("final_loss") is None:
        row = {}
    elif averaged:
        measured = {key.removeprefix("ema_"): row[key] for key in row if key.startswith("ema_")}
        row = {**row, **measured}
    return Origin(
        name=config.get("name") or row.get("name") or home.name,
        study=config.get("study"),
        run_id=config.get("run_id") or (home.name if train and config.get("study") else None),
        averaged=averaged,
        classes=config_classes(config),
        source=config.get("source") or {},
        train=train,
        preparation=_preparation(config, spec),
        row=row,
    )


def evaluation_spec(config: Mapping[str, Any]) -> TrainSpec | None:
    """How `sret eval` prepares images for a stored model, by its `config.json`.

    None if the model was neither trained nor converted. Converted models take images that are
    prepared as ImageNet's. The `data_dir` of a model whose config has none is ".".
    """
    settings = config.get("train")
    if not settings:
        return TrainSpec(data_dir=".") if config.get("source") else None
    embedded = settings.get("dataset") in ("digits", "synthetic")
    if not embedded and settings.get("data_dir") is None:
        settings = {**settings, "data_dir": "."}
    return read_train(settings)


def _preparation(config: Mapping[str, Any], spec: Spec) -> Preparation | None:
    train = evaluation_spec(config)
    if train is None or spec.in_chans not in (1, 3):
        return None
    pixels = Pixels.of(train, spec)
    return Preparation(
        mean=pixels.mean,
        std=pixels.std,
        interpolation=train.interpolation,
        crop_pct=train.crop_pct,
    )
