"""The reference's key layout: conversion to and from ours, and recognising a model by its shapes.

The reference (github.com/szq0214/SReT) registers a shared block once for each pass through it:
`transformers.S.blocks.I` is pass I/2 of stage S where I is even, and its NLL where I is odd. So its
state dict repeats each tensor of a block once a pass; ours holds it once. The coefficients of a
residual sum are tensors of one number there, and one vector here.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sret_cli.runtime.errors import CHECKPOINT, SretError
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import PRESETS

OURS = re.compile(r"stages\.(\d+)\.(blocks|nlls)\.(\d+)\.(.+)")
THEIRS = re.compile(r"transformers\.(\d{1,4})\.blocks\.(\d{1,6})\.")
TOP_NAMES = frozenset(("patch_embed", "pos_embed", "transformers", "pools", "norm", "head"))
COEFFICIENTS = {"blocks": 4, "nlls": 2}  # of each block and of each NLL


class Entry(NamedTuple):
    """A key of the reference, and the place of its tensor in our state dict.

    Attributes:
        key: the reference's key.
        ours: our key.
        coefficient: index into our vector of coefficients; None for the complete tensor.
    """

    key: str
    ours: str
    coefficient: int | None = None


def layout(spec: ModelSpec, state: Mapping[str, Tensor]) -> list[Entry]:
    """The reference's keys of a model with that state dict, in the reference's order.

    Raises:
        SretError: the reference has no such model, so there is no layout for it.
    """
    for stage in range(spec.stages):
        order = [p.block for p in spec.schedule(stage)]
        if order != sorted(order):
            _refuse(f"stage {stage + 1} does not run its blocks one after the other")
    if spec.nll != "per_pass":
        _refuse(f"nll = {spec.nll!r}, but it has an NLL for each pass; use nll = 'per_pass'")
    if spec.residual != "lrc":
        _refuse(f"residual = {spec.residual!r}, but it learns coefficients; use residual = 'lrc'")
    inside: dict[tuple[str, ...], list[str]] = {}
    before: list[Entry] = []
    after: list[Entry] = []
    for name in state:
        if match := OURS.fullmatch(name):
            *module, rest = match.groups()
            inside.setdefault(tuple(module), []).append(rest)
        elif name.startswith("stem."):
            before.append(Entry(name.replace("stem.", "patch_embed.", 1), name))
        else:
            (before if name == "pos_embed" else after).append(Entry(name, name))
    for stage in range(spec.stages):
        for index, one in enumerate(spec.schedule(stage)):
            for i, kind, number in ((0, "blocks", one.block), (1, "nlls", one.nll)):
                theirs = f"transformers.{stage}.blocks.{2 * index + i}"
                ours = f"stages.{stage}.{kind}.{number}"
                names = inside[str(stage), kind, str(number)]
                for rest in (n for n in names if n != "lrc"):
                    renamed = rest.replace("norm.", "norm1.") if kind == "nlls" else rest
                    before.append(Entry(f"{theirs}.{renamed}", f"{ours}.{rest}"))
                count = COEFFICIENTS[kind]
                if state[f"{ours}.lrc"].shape != (count,):
                    _refuse("lrc = 'per_pass', but it learns coefficients for each block")
                before += [
                    Entry(f"{theirs}.coefficient{c + 1}.bias", f"{ours}.lrc", c)
                    for c in range(count)
                ]
    return before + after


def _refuse(reason: str) -> None:
    raise SretError(f"the reference has no layout for the weights of this model: {reason}")


def to_reference(spec: ModelSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in the reference's layout; repeated keys use the same memory.

    Raises:
        SretError: the reference has no such model.
    """
    return {
        key: state[ours] if c is None else state[ours][c : c + 1]
        for key, ours, c in layout(spec, state)
    }


def from_reference(entries: list[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the reference's layout, converted to ours.

    Args:
        entries: the layout of the model.
        tensors: the state dict, which has all keys of the layout.

    Raises:
        SretError: repeated keys of one shared tensor do not agree bitwise.
    """
    found: dict[str, list[Tensor]] = {}
    first: dict[tuple[str, int | None], str] = {}
    for key, ours, coefficient in entries:
        one = first.setdefault((ours, coefficient), key)
        if one == key:
            found.setdefault(ours, []).append(tensors[key])
        elif not same_bits(tensors[one], tensors[key]):
            raise SretError(
                f"{key} differs from {one}, but both are one shared tensor: the checkpoint is "
                "damaged or of another model; use another file or --preset",
                CHECKPOINT,
            )
    vectors = {ours for ours, coefficient in first if coefficient is not None}
    return {k: torch.cat(parts) if k in vectors else parts[0] for k, parts in found.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors have the same type, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()):
        return True
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def recognise(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The preset of a state dict in the reference's layout, and the fields of its spec.

    The shapes determine everything except heads, slices and the strides of the stem. Heads and
    slices are those of the first preset that fits, of the same image size if one has it; strides
    are 2, as in the reference. If no preset fits, slices are 1, and `values` has to name the heads.

    Args:
        tensors: the state dict.
        values: fields that replace the recognised ones.

    Raises:
        SretError: the tensors are not the weights of an SReT, or the heads are not known.
    """
    passes = _passes(tensors)
    firsts = [f"transformers.{stage}.blocks." for stage in range(len(passes))]
    side = _size(tensors, "pos_embed", 4, -1)
    widths = tuple(_size(tensors, f"{first}0.norm1.weight", 1, 0) for first in firsts)
    hidden = {
        "mlp_ratio": [_size(tensors, f"{first}0.mlp.fc1.weight", 2, 0) for first in firsts],
        "nll_ratio": [_size(tensors, f"{first}1.mlp.fc1.weight", 2, 0) for first in firsts],
    }
    found = {
        "img_size": side * prod(values.get("stem_strides", (2, 2, 2))),
        "in_chans": _size(tensors, "patch_embed.conv1.weight", 4, 1),
        "num_classes": _size(tensors, "head.weight", 2, 0) if "head.weight" in tensors else 0,
    }
    fits = [
        name
        for name, spec in PRESETS.items()
        if spec.nll == "per_pass"
        and spec.embed_dims == widths
        and [spec.hidden(s, "mlp") for s in range(spec.stages)] == hidden["mlp_ratio"]
        and [spec.hidden(s, "nll") for s in range(spec.stages)] == hidden["nll_ratio"]
        and [len(spec.schedule(s)) for s in range(spec.stages)] == passes
        and _shares_like(tensors, spec)
    ]
    fits.sort(key=lambda name: PRESETS[name].img_size != found["img_size"])
    if fits:
        return fits[0], {**PRESETS[fits[0]].model_dump(), **found, **values}
    if "num_heads" not in values:
        raise SretError(
            f"no preset has these shapes (widths {_dashes(widths)}, passes {_dashes(passes)}), and "
            "heads cannot be recognised; give --set 'model.num_heads=[…]', one for each stage",
            CHECKPOINT,
        )
    recursions = [_run_length(tensors, stage, count) for stage, count in enumerate(passes)]
    found |= {
        "embed_dims": widths,
        "blocks": tuple(c // r for c, r in zip(passes, recursions, strict=True)),
        "recursions": tuple(recursions),
        "slices": (1,) * len(passes),
        "recursive_slices": (1,) * len(passes),
        "nll": "per_pass",
        **{name: _ratio(name, units, widths) for name, units in hidden.items()},
    }
    return None, {**found, **values}


def _passes(tensors: Mapping[str, Tensor]) -> list[int]:
    """The number of passes of each stage."""
    indices: dict[int, set[int]] = {}
    for match in filter(None, map(THEIRS.match, tensors)):
        indices.setdefault(int(match[1]), set()).add(int(match[2]))
    if not indices:
        names = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise SretError(
            f"not an SReT's weights in the reference's layout: it has no key transformers.…, but "
            f"{names}",
            CHECKPOINT,
        )
    counts = [len(indices.get(stage, ())) for stage in range(len(indices))]
    for stage, count in enumerate(counts):
        if not count or count % 2 or indices[stage] != set(range(count)):
            raise SretError(
                f"stage {stage + 1}: {count} entries of transformers.{stage}.blocks are not pairs "
                "of a block and its NLL; the checkpoint is incomplete, use another",
                CHECKPOINT,
            )
    return [count // 2 for count in counts]


def _size(tensors: Mapping[str, Tensor], key: str, dimensions: int, axis: int) -> int:
    if key not in tensors:
        raise SretError(f"not an SReT's weights: {key} is missing", CHECKPOINT)
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions:
        raise SretError(f"not an SReT's weights: {key} has the shape {shape}", CHECKPOINT)
    return shape[axis]


def _qkv(stage: int, number: int) -> str:
    return f"transformers.{stage}.blocks.{2 * number}.attn.qkv.weight"


def _agree(tensors: Mapping[str, Tensor], stage: int, one: int, other: int) -> bool:
    keys = _qkv(stage, one), _qkv(stage, other)
    return all(k in tensors for k in keys) and same_bits(*(tensors[k] for k in keys))


def _shares_like(tensors: Mapping[str, Tensor], spec: ModelSpec) -> bool:
    """Whether some passes share their weights in each stage where those of a preset do."""
    return all(
        spec.recursions[stage] == 1
        or any(_agree(tensors, stage, i, i + 1) for i in range(len(spec.schedule(stage)) - 1))
        for stage in range(spec.stages)
    )


def _run_length(tensors: Mapping[str, Tensor], stage: int, passes: int) -> int:
    """The largest number of passes in a row that have the same weights."""
    longest = run = 1
    for number in range(1, passes):
        run = run + 1 if _agree(tensors, stage, number - 1, number) else 1
        longest = max(longest, run)
    if passes % longest:
        raise SretError(
            f"stage {stage + 1}: {longest} passes in a row share their weights, which does not "
            f"divide its {passes} passes; the checkpoint is damaged, or its blocks repeat unevenly",
            CHECKPOINT,
        )
    return longest


def _ratio(name: str, hidden: list[int], widths: tuple[int, ...]) -> float:
    """The shortest decimal ratio with int(ratio * width) hidden units in each stage."""
    pairs = list(zip(hidden, widths, strict=True))
    low = max(Fraction(units, width) for units, width in pairs)
    for decimals in range(12):
        ratio = ceil(low * 10**decimals) / 10**decimals
        if all(int(ratio * width) == units for units, width in pairs):
            return ratio
    raise SretError(
        f"no single {name} gives {_dashes(hidden)} hidden units at the widths {_dashes(widths)}",
        CHECKPOINT,
    )


def _dashes(values: Any) -> str:
    return "-".join(map(str, values))
