"""Where a model comes from: its run or file, its classes, and how its images are prepared.

An export carries this with the weights, so that whoever gets the file alone can use it.
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

MAX_NAME = 80  # characters of a name in that of a directory


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a tensor: resized and cropped, scaled to 0..1, normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; what is not known is None or empty."""

    name: str
    study: str | None = None
    run_id: str | None = None
    averaged: bool = False
    classes: tuple[str, ...] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)  # the file it was converted from
    train: Mapping[str, Any] | None = None
    preparation: Preparation | None = None
    row: Row = field(default_factory=dict)  # what the run measured, if it was trained

    @property
    def directory_name(self) -> str:
        """A name for a directory: letters, digits, dots, dashes and underscores alone.

        It has the run's id, so that runs of one name have directories of their own.
        """
        parts = (self.name, self.run_id or "", "ema" if self.averaged else "")
        return "-".join(filter(None, map(safe_name, parts))) or "model"

    def config(self) -> Row:
        """What `config.json` of an export says next to the spec."""
        known: Row = {"name": self.name, "study": self.study, "run_id": self.run_id}
        known |= {"classes": None if self.classes is None else list(self.classes)}
        known |= {"source": dict(self.source), "train": self.train and dict(self.train)}
        known |= {"averaged": self.averaged or None}
        return {key: value for key, value in known.items() if value}

    def metadata(self, spec: Spec) -> dict[str, str]:
        """What the file of an export says of itself; lists and tables are JSON."""
        values: Row = {"sret_version": __version__, "name": self.name, "study": self.study}
        values |= {"run_id": self.run_id, "model": spec.model_dump(mode="json")}
        values |= {key: getattr(spec, key) for key in ("img_size", "in_chans", "num_classes")}
        values["classes"] = None if self.classes is None else list(self.classes)
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
    """A text as a part of a file's name: what is no letter, digit, dot or underscore is a dash."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)[:MAX_NAME].strip("-.")


def read_origin(directory: Path, spec: Spec, row: Row | None = None) -> Origin:
    """The origin of the model in the directory of a run, of its averaged weights, or of a model.

    Raises:
        SretError: there is no model, or its `config.json` or the run's row is damaged.
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


def _preparation(config: Mapping[str, Any], spec: Spec) -> Preparation | None:
    """As `sret eval` prepares the images; None where the model was neither trained nor converted.

    The reference's checkpoints take images as ImageNet's are prepared.
    """
    settings = config.get("train") or ({"data_dir": "."} if config.get("source") else None)
    if settings is None or spec.in_chans not in (1, 3):
        return None
    train = read_train(settings) if config.get("train") else TrainSpec(**settings)
    pixels = Pixels.of(train, spec)
    return Preparation(pixels.mean, pixels.std, train.interpolation, train.crop_pct)
