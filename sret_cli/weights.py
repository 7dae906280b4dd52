"""Models on disk, in and out: ours, and checkpoints in the reference's layout.

Ours are `config.json` and `model.safetensors`. A reference checkpoint is a zip as torch.save writes
it (`.pth`, `.pt`, `.ckpt`, `.bin`, `.tar`), or `.safetensors`.
"""

import hashlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sret_cli.backbone import read_spec
from sret_cli.classes import ClassList, all_outputs, config_classes, match_classes
from sret_cli.errors import CHECKPOINT, USAGE, SretError, note_once
from sret_cli.model import SReT, build_model
from sret_cli.records import CONFIG_FILE, make_directory, read_json, write_atomically, write_json
from sret_cli.recurse import build_any
from sret_cli.reference import TOP_NAMES, from_reference, layout, recognise, to_reference
from sret_cli.run import resolve_sret
from sret_cli.safe_read import read_tensors, read_weights
from sret_cli.spec import ModelSpec, preset
from sret_cli.state_dicts import State, without_prefix

WEIGHTS_FILE = "model.safetensors"
REFERENCE_FILE = "model.pth"

MAX_TABLE_LINES = 20


def save_weights(
    state: Mapping[str, Tensor], directory: Path, metadata: dict[str, str] | None = None
) -> Path:
    """Writes a model's state dict, atomically; returns the file."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    path = directory / WEIGHTS_FILE
    write_atomically(path, save(tensors, metadata))
    return path


def check_no_model(directory: Path) -> None:
    """Makes sure that a model can be written to a directory, which is made.

    Raises:
        SretError: the directory cannot be written to, or holds a model already.
    """
    make_directory(directory)
    if (directory / WEIGHTS_FILE).exists():
        raise SretError(f"{directory} holds a model already; choose another directory", USAGE)


def save_model(
    model: Any,
    directory: Path,
    about: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` of a model that is not a run's.

    Args:
        model: the model.
        directory: where; made where it is missing.
        about: what `config.json` says beside the spec.
        metadata: what the file of weights says of itself.

    Raises:
        SretError: the directory cannot be written to, or holds a model already.
    """
    check_no_model(directory)
    save_weights(model.state_dict(), directory, metadata)
    spec = model.spec.model_dump(mode="json")
    write_json(directory / CONFIG_FILE, {**(about or {}), "model": spec})


def load_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a run or of a built model.

    Raises:
        SretError: there is none, or it is damaged.
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
    """The model, of either kind of spec, that a directory holds, with its weights.

    Args:
        directory: a run's, or one of `save_model`.
        changes: fields of the spec to build it with instead, such as `img_size`, for which the
            position embeddings are resampled; single numbers of slices fit each stage.

    Raises:
        SretError: a file is missing or damaged, or the weights are of another model.
    """
    spec = read_spec(load_config(directory)["model"])
    if isinstance(spec, ModelSpec):
        spec = changed(spec, changes or {})
    elif changes:
        raise SretError(f"{', '.join(changes)} of a timm model cannot be changed after training")
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise SretError(f"{directory} has no {WEIGHTS_FILE}; train the run first", CHECKPOINT)
    tensors = read_tensors(path)
    if changes and "img_size" in changes and isinstance(spec, ModelSpec):
        tensors = _fitted(tensors, spec)
    model = build_any(spec)
    _check_shapes(model.state_dict(), tensors, str(path))
    model.load_state_dict(_like(model.state_dict(), tensors, str(path)))
    return model


def load_weights(
    model: Any, directory: Path, classes: ClassList | None = None, reset_head: bool = False
) -> None:
    """Loads what a directory holds into a model of the same design.

    Position embeddings of another image size are resampled; a head for another number of classes
    stays fresh, which is told once, and with `reset_head` any. Where `classes` tells those that the
    model is to have, the head gets their order.

    Raises:
        SretError: a file is missing or damaged, or the weights are of another model, or of other
            classes.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise SretError(f"{directory} has no {WEIGHTS_FILE}; name a trained run", CHECKPOINT)
    tensors, state = read_tensors(path), model.state_dict()
    if isinstance(model.spec, ModelSpec):
        tensors = _fitted(tensors, model.spec)
    head = [key for key in _head_keys(model) if key in tensors and key in state]
    for key in head:
        if not reset_head and tensors[key].shape[0] != state[key].shape[0]:
            note_once(
                f"train.init = {directory} has {tensors[key].shape[0]:,} classes, and the model "
                f"{state[key].shape[0]:,}: its head is not taken, and starts anew"
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
    _check_shapes(state, tensors, str(path))
    model.load_state_dict(_like(state, tensors, str(path)))


def _head_keys(model: Any) -> list[str]:
    """The tensors of a model's classifiers, of which some models of timm's have two."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    names = (names,) if isinstance(names, str) else names
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def load_state(model: nn.Module, tensors: State, where: str) -> None:
    """Loads a whole state dict into a model; `where` it is from goes into messages.

    Raises:
        SretError: it is of another model, or holds NaN or infinity.
    """
    state = model.state_dict()
    _check_shapes(state, tensors, where)
    model.load_state_dict(_like(state, tensors, where))


def changed(spec: ModelSpec, changes: Mapping[str, Any]) -> ModelSpec:
    """A spec with other fields; single numbers of slices fit each stage, as `--slices` does.

    Raises:
        SretError: the fields do not fit together, such as slices that no longer divide the tokens.
    """
    if not changes:
        return spec
    table = {**spec.model_dump(), **changes}
    if "slices" in changes and "recursive_slices" not in changes:
        table["recursive_slices"] = changes["slices"]
    return resolve_sret(table)


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
    tensors = _fitted(tensors, model.spec)
    _check_shapes(expected, tensors, where)
    ours = from_reference(entries, tensors)
    model.load_state_dict(_like(state, ours, where), strict=not reset_head)


def resample_pos_embed(pos_embed: Tensor, side: int) -> Tensor:
    """Position embeddings `[1, C, Y, X]` for a square of that side, by timm's bicubic function."""
    if pos_embed.shape[-2:] == (side, side):
        return pos_embed
    from timm.layers import resample_abs_pos_embed_nhwc

    resampled = resample_abs_pos_embed_nhwc(pos_embed.permute(0, 2, 3, 1), [side, side])
    return resampled.permute(0, 3, 1, 2).contiguous()


def _fitted(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The state dict with position embeddings of the spec's image size."""
    found = tensors.get("pos_embed")
    if found is None or found.ndim != 4 or found.shape[:2] != (1, spec.embed_dims[0]):
        return tensors  # of another model: the check of shapes says so
    return {**tensors, "pos_embed": resample_pos_embed(found, spec.sides[0])}


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
    spec = resolve_sret({**table, **changes})
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


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shapes(expected: State, found: State, where: str) -> None:
    """Refuses a state dict of another model, with a table of the keys that differ."""
    lines = []
    for key in (*expected, *(k for k in found if k not in expected)):
        needs, has = (tuple(s[key].shape) if key in s else None for s in (expected, found))
        if needs != has:
            what = "missing" if has is None else "unexpected" if needs is None else "misshapen"
            lines.append((key, what, *("–" if s is None else str(s) for s in (has, needs))))
    if not lines:
        return
    kinds = [
        (kind, sum(line[1] == kind for line in lines))
        for kind in ("missing", "unexpected", "misshapen")
    ]
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds if count)
    key, _, has_shape, needs_shape = lines[0]
    hint = "; --reset-head gives it a fresh head" * all(
        line[0].startswith("head.") for line in lines
    )
    shown = [("Key", "Is", "Has the shape", "Needs"), *lines[:MAX_TABLE_LINES]]
    if len(lines) > MAX_TABLE_LINES:
        shown.append((f"… and {len(lines) - MAX_TABLE_LINES:,} more", "", "", ""))
    raise SretError(
        f"{where} is of another model: {len(lines):,} tensors differ ({counts}), first {key} "
        f"(has {has_shape}, needs {needs_shape}){hint}",
        CHECKPOINT,
        shown,
    )


def _like(state: State, tensors: State, where: str) -> dict[str, Tensor]:
    """Tensors in the types of a model's own; refuses NaN and infinity."""
    cast = {key: tensor.to(state[key].dtype) for key, tensor in tensors.items()}
    for key, tensor in cast.items():
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise SretError(
                f"{where}: {key} has {bad:,} values that are NaN or infinite; the checkpoint is "
                "of a run that diverged, or damaged",
                CHECKPOINT,
            )
    return cast
