"""Models on disk: `config.json` and `model.safetensors`, in and out."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from sret_cli.backbone import read_spec
from sret_cli.errors import CHECKPOINT, USAGE, SretError
from sret_cli.records import make_directory, read_json, write_atomically, write_json
from sret_cli.recurse import build_any

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_weights(model: nn.Module, directory: Path) -> Path:
    """Writes a model's state dict, atomically; returns the file."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    path = directory / WEIGHTS_FILE
    write_atomically(path, save(tensors))
    return path


def save_model(model: Any, directory: Path) -> None:
    """Writes `config.json` and `model.safetensors` of a model that is not a run's.

    Raises:
        SretError: the directory cannot be written to, or holds a model already.
    """
    make_directory(directory)
    if (directory / WEIGHTS_FILE).exists():
        raise SretError(f"{directory} holds a model already; choose another directory", USAGE)
    save_weights(model, directory)
    write_json(directory / CONFIG_FILE, {"model": model.spec.model_dump(mode="json")})


def load_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a run or of a built model.

    Raises:
        SretError: there is none, or it is damaged.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise SretError(
            f"{directory} has no {CONFIG_FILE}; name a run's directory or one that "
            "`sret build --out` wrote",
            CHECKPOINT,
        )
    config = read_json(directory / CONFIG_FILE)
    if not isinstance(config, dict) or "model" not in config:
        raise SretError(f"{directory / CONFIG_FILE} does not describe a model", CHECKPOINT)
    return config


def load_model(directory: Path) -> Any:
    """The model, of either kind of spec, that a directory holds, with its weights.

    Raises:
        SretError: a file is missing or damaged, or the weights are of another model.
    """
    spec = read_spec(load_config(directory)["model"])
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise SretError(f"{directory} has no {WEIGHTS_FILE}; train the run first", CHECKPOINT)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SretError(f"{path} is damaged or no safetensors file: {error}", CHECKPOINT) from None
    model = build_any(spec)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | found if expected.get(k) != found.get(k))
        raise SretError(
            f"{path} is of another model: {len(wrong)} tensors differ, first {wrong[0]} "
            f"(has {found.get(wrong[0])}, needs {expected.get(wrong[0])})",
            CHECKPOINT,
        )
    model.load_state_dict(tensors)
    return model
