"""Writes and reads our models on disk: `config.json` and `model.safetensors` of a directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from sret_cli.data.class_names import ClassList, all_outputs, config_classes, match_classes
from sret_cli.model.kinds import build_any
from sret_cli.runtime.errors import CHECKPOINT, USAGE, SretError, show_note_once
from sret_cli.runtime.files import make_directory, read_json, write_atomically, write_json
from sret_cli.spec.backbone import Spec, read_spec
from sret_cli.spec.run import CONFIG_FILE
from sret_cli.weights.match import cast_like, check_shapes, with_fitted_pos_embed
from sret_cli.weights.safe_read import read_tensors

WEIGHTS_FILE = "model.safetensors"


def save_weights(
    state: Mapping[str, Tensor], directory: Path, metadata: dict[str, str] | None = None
) -> Path:
    """Writes a model's state dict, atomically; returns the file."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    path = directory / WEIGHTS_FILE
    write_atomically(path, save(tensors, metadata))
    return path


def check_no_model(directory: Path) -> None:
    """Creates a directory for a model.

    Raises:
        SretError: the directory cannot be written to, or holds a model already.
    """
    make_directory(directory)
    if (directory / WEIGHTS_FILE).exists():
        raise SretError(f"{directory} already holds a model; choose another directory", USAGE)


def save_model(
    model: Any,
    directory: Path,
    about: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` of a model that does not belong to a run.

    Args:
        model: the model.
        directory: where to write; created if it does not exist.
        about: fields of `config.json` besides the spec.
        metadata: metadata of the file of weights.

    Raises:
        SretError: the directory cannot be written to, or holds a model already.
    """
    check_no_model(directory)
    save_weights(model.state_dict(), directory, metadata)
    spec = model.spec.model_dump(mode="json")
    write_json(directory / CONFIG_FILE, {**(about or {}), "model": spec})


def load_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a run or of another stored model.

    Raises:
        SretError: it does not exist, or is damaged.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise SretError(
            f"{directory} has no {CONFIG_FILE}; name a run's directory or one that "
            "`sret build --out` or `sret convert` wrote",
            CHECKPOINT,
        )
    try:
        config = read_json(directory / CONFIG_FILE)
    except SretError as error:
        raise SretError(str(error), CHECKPOINT) from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise SretError(f"{directory / CONFIG_FILE} does not describe a model", CHECKPOINT)
    return config


def load_model(directory: Path, changes: Mapping[str, Any] | None = None) -> Any:
    """The model that a directory holds, an SReT or a timm model, with its weights.

    Args:
        directory: a run's directory, or one that `save_model` wrote.
        changes: fields of the spec to change, such as `img_size`, for which the position embeddings
            are resampled; a single number of slices is fitted to each stage.

    Raises:
        SretError: a file is missing or damaged, or the weights are of another model.
    """
    spec = spec_with_changes(read_spec(load_config(directory)["model"]), changes or {})
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise SretError(f"{directory} has no {WEIGHTS_FILE}; train the run first", CHECKPOINT)
    tensors = read_tensors(path)
    if changes and "img_size" in changes:
        tensors = with_fitted_pos_embed(tensors, spec)
    model = build_any(spec)
    check_shapes(model.state_dict(), tensors, str(path))
    model.load_state_dict(cast_like(model.state_dict(), tensors, str(path)))
    return model


def load_weights(
    model: Any, directory: Path, classes: ClassList | None = None, reset_head: bool = False
) -> None:
    """Loads the weights of a directory into a model of the same design.

    Position embeddings of another image size are resampled. A head for another number of classes is
    not loaded, and the user is notified once.

    Args:
        model: the model; its weights are replaced.
        directory: holds the weights.
        classes: the classes of the model, to whose order the outputs of the head are sorted.
        reset_head: keep the model's own head.

    Raises:
        SretError: a file is missing or damaged, or the weights are of another model, or of other
            classes.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise SretError(f"{directory} has no {WEIGHTS_FILE}; name a trained run", CHECKPOINT)
    tensors, state = read_tensors(path), model.state_dict()
    tensors = with_fitted_pos_embed(tensors, model.spec)
    head = [key for key in _head_keys(model) if key in tensors and key in state]
    for key in head:
        if not reset_head and tensors[key].shape[0] != state[key].shape[0]:
            show_note_once(
                f"train.init = {directory} has {tensors[key].shape[0]:,} classes, and the model "
                f"{state[key].shape[0]:,}: the head is not loaded and starts from random weights"
            )
            reset_head = True
    if reset_head:
        tensors |= {key: state[key] for key in head}
    elif head and classes is not None:
        remedy = "use weights of these classes, or give the model a fresh head: train.reset_head"
        names = config_classes(load_config(directory))
        theirs = ClassList(names, f"train.init = {directory}", f"{remedy} = true", CHECKPOINT)
        order = match_classes(classes, theirs)
        if order is not None:
            rows = all_outputs(order, len(state[head[0]]))
            tensors |= {key: tensors[key][rows] for key in head}
    check_shapes(state, tensors, str(path))
    model.load_state_dict(cast_like(state, tensors, str(path)))


def _head_keys(model: Any) -> list[str]:
    """The keys of a model's classifier tensors; some timm models have two classifiers."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    names = (names,) if isinstance(names, str) else names
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def spec_with_changes(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """A spec with other fields; a single number of slices is fitted to each stage.

    Raises:
        SretError: the fields do not fit together, such as slices that no longer divide the tokens,
            or the model is a timm model.
    """
    if not changes:
        return spec
    if spec.is_timm:
        raise SretError(f"{', '.join(changes)} of a timm model cannot be changed after training")
    if "slices" in changes and "recursive_slices" not in changes:
        changes = {**changes, "recursive_slices": changes["slices"]}
    return spec.with_fitted(**changes)


def refuse_backbone(model: Any) -> None:
    """Refuses a timm model where only an SReT can be written.

    Raises:
        SretError: the model is a timm model.
    """
    if model.spec.is_timm:
        raise SretError(
            f"{model.spec.backbone} cannot be written in the reference's layout: it is a timm "
            "model, not an SReT; its weights are in model.safetensors of its directory"
        )
