"""sret: scaling studies of deep vision transformers with shared weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sret_cli.cost.count import count as count
    from sret_cli.cost.trace import profile as profile
    from sret_cli.model.sret import build_model as build_model
    from sret_cli.report.frame import read_rows as read_rows
    from sret_cli.spec.model import ModelSpec as ModelSpec
    from sret_cli.spec.presets import PRESETS as PRESETS
    from sret_cli.spec.train import TrainSpec as TrainSpec
    from sret_cli.training.evaluate import evaluate_run as evaluate_run
    from sret_cli.training.session import train as train
    from sret_cli.weights.convert import load_reference as load_reference

__version__ = "0.1.0"

# The public names, and where they are; each is imported when it is first used.
PUBLIC = {
    "ModelSpec": "spec.model:ModelSpec",
    "TrainSpec": "spec.train:TrainSpec",
    "PRESETS": "spec.presets:PRESETS",
    "count": "cost.count:count",
    "build_model": "model.sret:build_model",
    "load_reference": "weights.convert:load_reference",
    "profile": "cost.trace:profile",
    "train": "training.session:train",
    "evaluate": "training.evaluate:evaluate_run",
    "read_rows": "report.frame:read_rows",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'sret_cli' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(import_module(f"sret_cli.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
