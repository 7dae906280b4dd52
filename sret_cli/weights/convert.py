"""Checkpoints in the reference's layout, read into models and written from them."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sret_cli.model.sret import SReT, build_model
from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.runtime.files import make_directory, write_atomically
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import preset
from sret_cli.weights.match import cast_like, check_shapes, with_fitted_pos_embed
from sret_cli.weights.reference import TOP_NAMES, from_reference, layout, recognise, to_reference
from sret_cli.weights.safe_read import read_weights
from sret_cli.weights.state_dicts import State, without_prefix

REFERENCE_FILE = "model.pth"


def load_reference(model: SReT, source: str | Path | State, reset_head: bool = False) -> None:
    """Loads weights in the reference's layout into a model.

    Position embeddings of another image size are resampled. A prefix that all keys share is taken
    off.

    Args:
        model: the model, of the same design.
        source: a file that `read_reference` takes, or a state dict.
        reset_head: leave the model's own head, as for another number of classes.

    Raises:
        SretError: the file cannot be read safely or is damaged, or its weights are of another
            model; the error's `table` names keys that are missing, unexpected or misshapen.
    """
    if isinstance(source, Mapping):
        _load_reference(model, without_prefix(source, TOP_NAMES), "the state dict", reset_head)
    else:
        tensors = read_weights(Path(source), TOP_NAMES).tensors
        _load_reference(model, tensors, str(source), reset_head)


def _load_reference(model: SReT, tensors: dict[str, Tensor], where: str, reset_head: bool) -> None:
    state = model.state_dict()
    entries = layout(model.spec, state)
    if reset_head:
        entries = [e for e in entries if not e.key.startswith("head.")]
        tensors = {k: v for k, v in tensors.items() if not k.startswith("head.")}
    expected = {k: state[ours] if c is None else state[ours][:1] for k, ours, c in entries}
    tensors = with_fitted_pos_embed(tensors, model.spec)
    check_shapes(expected, tensors, where)
    ours = from_reference(entries, tensors)
    model.load_state_dict(cast_like(state, ours, where), strict=not reset_head)


class Converted(NamedTuple):
    """A model read from a reference checkpoint, the preset's name, and what was assumed.

    `place` are the names in the file that lead to its weights, and `averaged` whether these are
    averaged ones.
    """

    model: SReT
    name: str
    notes: list[str]
    place: str
    averaged: bool


def read_reference(
    path: Path,
    preset_name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    reset_head: bool = False,
    averaged: bool = False,
) -> Converted:
    """The model that a reference checkpoint holds; its design is recognised from the shapes.

    Args:
        path: a `.pth`, `.pt`, `.ckpt`, `.bin`, `.tar` or `.safetensors` file.
        preset_name: the design, where it is not to be recognised.
        changes: fields of the spec that stand before those recognised.
        reset_head: give the model a fresh head.
        averaged: take the averaged weights of a file that has plain ones, too.

    Raises:
        SretError: as `load_reference`, the design cannot be recognised, or the file has no averaged
            weights.
    """
    weights, changes = read_weights(path, TOP_NAMES, averaged), dict(changes or {})
    tensors = weights.tensors
    if preset_name is not None:
        name: str | None = preset_name
        table = preset(preset_name).model_dump()
        if "head.weight" in tensors and tensors["head.weight"].ndim == 2:
            table["num_classes"] = len(tensors["head.weight"])
    else:
        name, table = recognise(tensors, changes)
    if "slices" in changes and "recursive_slices" not in changes:
        table["recursive_slices"] = changes["slices"]
    spec = ModelSpec().with_fitted(**{**table, **changes})
    notes = list(weights.notes)
    if weights.has_other:
        notes[0] += "; --ema takes the averaged ones"
    if preset_name is None:
        note = f"recognised {name or 'no preset'} from the shapes"
        if not {"slices", "recursive_slices"} & changes.keys():
            slices, later = ("-".join(map(str, s)) for s in (spec.slices, spec.recursive_slices))
            note += f"; they do not tell slices: took {slices}, then {later}"
            note += " (--slices or --preset say otherwise)"
        notes.append(note)
    model = build_model(spec)
    _load_reference(model, tensors, str(path), reset_head)
    side, found = spec.sides[0], tensors["pos_embed"].shape[-1]
    if side != found:
        notes.append(f"resampled position embeddings from {found}x{found} to {side}x{side}")
    if reset_head:
        notes.append(f"fresh head for {spec.num_classes} classes")
    return Converted(model, name or "converted", notes, weights.place, weights.averaged)


def save_reference(model: SReT, directory: Path) -> Path:
    """Writes `model.pth` in the reference's layout, under "model", atomically; returns the file.

    Raises:
        SretError: the reference has no such model, or the directory cannot be written to.
    """
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    file = BytesIO()
    torch.save({"model": to_reference(model.spec, tensors)}, file)
    path = make_directory(directory) / REFERENCE_FILE
    if path.exists():
        raise SretError(f"{path} is there already; choose another directory", USAGE)
    write_atomically(path, file.getvalue())
    return path
