"""Finds plain and averaged weights in the checkpoints of common training scripts.

A checkpoint keeps its weights under some name ("model", "state_dict"), next to optimizers and
settings. Wrappers such as data-parallel training, `torch.compile` and Lightning add a prefix to
each key. Averaged weights have their own name ("model_ema" in DeiT, "state_dict_ema" in timm), or a
prefix ("ema_model." in Lightning), or a number `n_averaged` next to them
(`torch.optim.swa_utils.AveragedModel`). Lightning's `WeightAveraging` stores averaged weights as
"state_dict", and plain ones as "current_model_state".
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sret_cli.runtime.errors import CHECKPOINT, SretError

State = Mapping[str, Tensor]

PLAIN_NAMES = ("model", "state_dict")  # the first one that a file has is taken
LIGHTNING_PLAIN = "current_model_state"
AVERAGED = re.compile(
    r"(?<![a-zA-Z])(ema|swa|avg|averaged?)(?![a-zA-Z])|Ema|(?<![A-Z])(EMA|SWA)|Averag"
)
COUNTERS = ("n_averaged", "num_updates")  # next to averaged weights
MAX_DEPTH = 3  # nesting of dicts that are searched for averaged weights


class Weights(NamedTuple):
    """The tensors of one model in a checkpoint.

    Attributes:
        tensors: the state dict, without a prefix.
        place: keys and prefixes that lead to it in the file, joined by dots; "" for the file.
        averaged: whether these are averaged weights.
        notes: what the user should know about the choice.
        has_other: whether these are plain weights of a file that has averaged ones too.
    """

    tensors: dict[str, Tensor]
    place: str
    averaged: bool
    notes: tuple[str, ...] = ()
    has_other: bool = False


def choose_weights(
    value: Any, where: str, own: Collection[str] = (), averaged: bool = False
) -> Weights | None:
    """The plain or the averaged weights in a checkpoint; None if it holds no state dict.

    If a file has only averaged weights, these are taken.

    Args:
        value: the content of the file.
        where: the file's name, for messages.
        own: the first parts of the model's own keys, which are not removed as prefixes.
        averaged: take the averaged weights.

    Raises:
        SretError: the file has no averaged weights, or several models.
    """
    found = [w for entry in _entries(value) for w in _models(*entry, frozenset(own))]
    plain = [weights for weights in found if not weights.averaged]
    others = [weights for weights in found if weights.averaged]
    if averaged and not others:
        raise SretError(
            f"{where} holds no averaged weights, only {_places(found)}; leave out --ema", CHECKPOINT
        )
    if averaged or not plain:
        if not others:
            return None
        among = f" of {_places(others)}" if len(others) > 1 else ""
        note = f"took averaged weights: {_places(others[:1])}{among}"
        return others[0]._replace(notes=(note, *others[0].notes))
    for name in PLAIN_NAMES:
        named = [w for w in plain if w.place == name or w.place.startswith(f"{name}.")]
        plain = named or plain
        if named:
            break
    if len(plain) > 1:
        raise SretError(
            f"{where} holds several models ({_places(plain)}); save the state dict of one of them "
            "in a file of its own",
            CHECKPOINT,
        )
    (weights,) = plain
    if not others:
        return weights
    note = (
        f"{where} holds plain weights ({_places(plain)}) and averaged ones ({_places(others)}): "
        "took the plain ones"
    )
    return weights._replace(notes=(note, *weights.notes), has_other=True)


def without_prefix(tensors: State, own: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict without the prefix of all its keys, such as "module._orig_mod.".

    Args:
        tensors: the state dict.
        own: the first parts of the model's own keys, which are not removed.
    """
    prefix = _common_prefix(tensors, own)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dict of named tensors only, not all of which are single numbers."""
    return (
        isinstance(value, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        and any(tensor.ndim for tensor in value.values())
    )


def _entries(value: Any) -> Iterator[tuple[State, tuple[str, ...], bool]]:
    """The state dicts that may be a model's, with the keys that lead to them and if averaged.

    Plain ones are at the top or one key below; averaged ones may be nested deeper.
    """
    swapped = isinstance(value, dict) and is_state_dict(value.get(LIGHTNING_PLAIN))
    for path, state in _state_dicts(value, (), set()):
        averaged = _is_averaged(path) or (swapped and path == ("state_dict",))
        if averaged or len(path) < 2:
            yield state, path, averaged


def _state_dicts(
    value: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], State]]:
    """The state dicts in nested dicts, with the keys that lead to them; each dict is read once."""
    if not isinstance(value, dict) or id(value) in seen or len(path) > MAX_DEPTH:
        return
    seen.add(id(value))
    if is_state_dict(value):
        yield path, value
        return
    for key, inner in value.items():
        if isinstance(key, str):
            yield from _state_dicts(inner, (*path, key), seen)


def _models(
    state: State, path: tuple[str, ...], averaged: bool, own: frozenset[str]
) -> Iterator[Weights]:
    """The models in a state dict: one, or several, each under a prefix."""
    tensors = {key: tensor for key, tensor in state.items() if key not in COUNTERS}
    prefix = _common_prefix(tensors, own)
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    path = (*path, *prefix.split(".")[:-1])
    averaged = averaged or _is_averaged(path) or len(tensors) < len(state)
    notes = (f"removed {prefix!r} from all keys",) if prefix else ()
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts.setdefault(key.partition(".")[0], {})[key] = tensor
    models = {first: part for first, part in parts.items() if _has_prefix(part, own)}
    if own and not models and not own & parts.keys():  # another model: keys stay unchanged
        tensors, path, notes = dict(state), path[: len(path) - prefix.count(".")], ()
    if not models or own & parts.keys():
        yield Weights(tensors, ".".join(path), averaged, notes)
        return
    left_out = [key for first, part in parts.items() if first not in models for key in part]
    if left_out:
        more = f" and {len(left_out) - 1:,} more" if len(left_out) > 1 else ""
        notes = (*notes, f"ignored {left_out[0]}{more}, which are next to the model")
    for part in models.values():
        for weights in _models(part, path, averaged, own):
            yield weights._replace(notes=(*notes, *weights.notes))


def _is_averaged(path: Sequence[str]) -> bool:
    return any(map(AVERAGED.search, path))


def _has_prefix(part: State, own: frozenset[str]) -> bool:
    """Whether these keys have a prefix before the first parts of the model's own keys."""
    return any(not own.isdisjoint(key.split(".")[1:-1]) for key in part)


def _common_prefix(tensors: State, own: Collection[str]) -> str:
    """The prefix that all keys have in common, up to a dot."""
    keys, prefix = list(tensors), ""
    while keys:
        first, dot, _ = keys[0][len(prefix) :].partition(".")
        longer = f"{prefix}{first}."
        if not dot or first in own or not all(key.startswith(longer) for key in keys):
            break
        prefix = longer
    return prefix


def _places(found: Sequence[Weights]) -> str:
    return ", ".join(weights.place or "bare tensors" for weights in found) or "no weights"
