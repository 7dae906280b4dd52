"""The `sret train` command that trains one run alone, from its config."""

import json
import re
import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any

from sret_cli.runtime.errors import SretError
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.run import Table, flat
from sret_cli.spec.train import TrainSpec, model_fields

# Fields that have a flag of their own; the others are given with --set.
FLAGS = {
    "model.backbone": "--backbone",
    "model.preset": "--preset",
    "model.img_size": "--img-size",
    "model.num_classes": "--num-classes",
    "train.dataset": "--dataset",
    "train.data_dir": "--data-dir",
    "train.recipe": "--recipe",
    "train.epochs": "--epochs",
    "train.batch_size": "--batch-size",
    "train.lr": "--lr",
    "train.weight_decay": "--weight-decay",
    "train.seed": "--seed",
    "train.precision": "--precision",
}
# Text that TOML reads as something else: true, inf, 12, 2020-01-01.
PLAIN = re.compile(r"(?!(?:true|false|inf|nan)$)[A-Za-z_][\w./-]*")


def train_command(config: Mapping[str, Any]) -> str | None:
    """The command that trains the run of a `config.json` alone, or None if no command can.

    The run gets the same id, in the study `train`. A run that continues another one is trained by
    `sret train --resume` with the directory of that other run.
    """
    model, train = config.get("model"), config.get("train")
    if not isinstance(model, dict) or not isinstance(train, dict) or not train:
        return None
    if config.get("continues") is not None:
        directory = f"runs/{config.get('study')}/{config['continues']}"
        return shlex.join(
            ["sret", "train", "--resume", directory, f"--epochs={train.get('epochs')}"]
        )
    try:
        given = _given_to_train(train)
    except (SretError, TypeError):
        return None
    recipe = str(train.get("recipe", "none"))
    spec = _given_to_backbone(model, recipe) if "backbone" in model else _given(model, recipe)
    fields = flat("model", spec) | flat("train", given)
    words = [
        word
        for key in sorted(fields, key=lambda k: k not in FLAGS)
        for word in _words(key, fields[key])
    ]
    return shlex.join(["sret", "train", *words])


def _given_to_train(train: Table) -> Table:
    """The fields of a training that have to be given, so that all fields have these values."""
    first = ("recipe", "dataset", "data_dir")
    usual = {name: field.default for name, field in TrainSpec.model_fields.items()}
    given: Table = {k: train[k] for k in first if k in train and train[k] != usual[k]}
    for _ in range(2):  # fields that are given change the defaults of others
        made = TrainSpec(**given).model_dump(mode="json")
        given |= {
            key: "none" if value is None else value
            for key, value in train.items()
            if made.get(key) != value
        }
    return given


def _given(model: Table, recipe: str) -> Table:
    """The preset and the fields of a model that have to be given; the fewest of all presets."""
    choices = [
        {"preset": name} | {k: v for k, v in model.items() if usual.get(k) != v}
        for name, usual in _presets(recipe).items()
    ]
    given = min(choices, key=len)
    return given | {"num_classes": model.get("num_classes")}  # the default is that of the data


@cache
def _presets(recipe: str) -> dict[str, Table]:
    return {
        name: spec.model_dump(mode="json") | model_fields(recipe, name, False)
        for name, spec in PRESETS.items()
    }


def _given_to_backbone(model: Table, recipe: str) -> Table:
    usual = {name: field.default for name, field in BackboneSpec.model_fields.items()}
    usual |= model_fields(recipe, str(model["backbone"]), True)
    always = ("backbone", "img_size", "num_classes")  # the defaults are those of timm and the data
    return {key: v for key, v in model.items() if key in always or usual.get(key) != v}


def _words(key: str, value: Any) -> list[str]:
    if key in FLAGS:
        return [FLAGS[key], str(value)]
    is_plain = isinstance(value, str) and PLAIN.fullmatch(value)
    return ["--set", f"{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}"]
