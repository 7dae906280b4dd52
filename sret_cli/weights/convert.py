"""Reads checkpoints in the reference's layout into models, and writes them."""

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

    In that layout a shared block has one entry for each pass; these entries have to agree bitwise.
    Position embeddings of another image size are resampled. A prefix that all keys have in common
    is removed. Nothing in the file is executed.

    Args:
        model: a model of the same design; its weights are replaced.
        source: a file that `read_reference` takes, or a state dict.
        reset_head: keep the model's own head, for example for another number of classes.

    Raises:
        SretError: the file cannot be read safely or is damaged, or its weights are of another
            model; the error's `table` lists keys that are missing, unexpected or misshapen.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from sret_cli import PRESETS, build_model, load_reference
        >>> from sret_cli.weights.convert import save_reference
        >>> spec = PRESETS["sret_t"].with_values(img_size=32, slices=1, recursive_slices=1)
        >>> trained, model = build_model(spec), build_model(spec)
        >>> with TemporaryDirectory() as directory:
        ...     load_reference(model, save_reference(trained, Path(directory)))
        >>> bool((model.head.weight == trained.head.weight).all())
        True
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
    """A model read from a reference checkpoint.

    Attributes:
        model: the model with its weights.
        name: name of the preset, or "converted".
        notes: what was assumed, for the user.
        place: the keys in the file that lead to the weights, joined by dots.
        averaged: whether the weights are averaged ones.
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
        preset_name: the design, instead of the recognised one.
        changes: fields of the spec that replace the recognised ones.
        reset_head: give the model a fresh head.
        averaged: take the averaged weights of a file that has plain weights too.

    Raises:
        SretError: as `load_reference`; or the design cannot be recognised, or the file has no
            averaged weights.
    """
    weights, changes = read_weights(path, TOP_NAMES, averaged), dict(changes or {})
    tensors = weights.tensors
    name, table = _design(tensors, preset_name, changes)
    spec = ModelSpec().with_fitted(**{**table, **changes})
    notes = list(weights.notes)
    if weights.has_other:
        notes[0] += "; --ema takes the averaged ones"
    if preset_name is None:
        notes.append(_recognition_note(name, spec, changes))
    model = build_model(spec)
    _load_reference(model, tensors, str(path), reset_head)
    side, found = spec.sides[0], tensors["pos_embed"].shape[-1]
    if side != found:
        notes.append(f"resampled position embeddings from {found}x{found} to {side}x{side}")
    if reset_head:
        notes.append(f"fresh head for {spec.num_classes} classes")
    return Converted(
        model=model,
        name=name or "converted",
        notes=notes,
        place=weights.place,
        averaged=weights.averaged,
    )


def _design(
    tensors: Mapping[str, Tensor], preset_name: str | None, changes: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The name of the preset, if it is one, and the fields of the spec."""
    if preset_name is None:
        name, table = recognise(tensors, changes)
    else:
        name, table = preset_name, preset(preset_name).model_dump()
        if "head.weight" in tensors and tensors["head.weight"].ndim == 2:
            table["num_classes"] = len(tensors["head.weight"])
    if "slices" in changes and "recursive_slices" not in changes:
        table["recursive_slices"] = changes["slices"]
    return name, table


def _recognition_note(name: str | None, spec: ModelSpec, changes: Mapping[str, Any]) -> str:
    """What the user should know about a recognised design."""
    note = f"recognised {name or 'no preset'} from the shapes"
    if {"slices", "recursive_slices"} & changes.keys():
        return note
    first, later = ("-".join(map(str, s)) for s in (spec.slices, spec.recursive_slices))
    return (
        f"{note}, which do not depend on slices: took slices {first}, then {later} "
        "(set others by --slices or --preset)"
    )


def save_reference(model: SReT, directory: Path) -> Path:
    """Writes `model.pth` in the reference's layout, under "model", atomically; returns the file.

    Raises:
        SretError: the reference has no such model, the directory has a `model.pth`, or it cannot be
            written to.
    """
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    file = BytesIO()
    torch.save({"model": to_reference(model.spec, tensors)}, file)
    path = make_directory(directory) / REFERENCE_FILE
    if path.exists():
        raise SretError(f"{path} already exists; choose another directory", USAGE)
    write_atomically(path, file.getvalue())
    return path
