"""The state of a training: how far it is, its tensors and the states of the random generators.

A state is a tree of dicts, lists and tuples whose leaves are tensors and plain values.
"""

import random
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sret_cli.spec.run import Row

State = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass
class TrainingProgress:
    """How far a training is: plain values, all of them in its checkpoints.

    Attributes:
        step: steps that are done.
        epoch: epochs that are done and evaluated.
        batch: batches of the current epoch that are done.
        loss_sum: the sum of the losses of these batches.
        images: images that the steps have used, each repeat counted.
        seconds: time that the steps took, without evaluations and checkpoints.
        metrics_bytes: length of `metrics.jsonl`.
        results: the columns of the row that the last evaluation gave.
        bad_images: what is wrong with each image that was left out.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    results: Row = field(default_factory=dict)
    bad_images: list[str] = field(default_factory=list)


def flatten_state(state: State) -> tuple[Tensors, Any]:
    """Copies of a state's tensors on the CPU, by name, and its tree as JSON with these names."""
    tensors: Tensors = {}
    names: dict[Any, str] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            known = names.setdefault(key, name)
            if known == name:
                copy = value.detach().to("cpu", copy=True)
                tensors[name] = copy.contiguous()
            return {"$tensor": known}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, f"{name}/{key}") for key, item in value.items()}
            return {"$dict": [[key, walk(item, f"{name}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{name}/{index}") for index, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        assert value is None or isinstance(value, bool | int | float | str), (name, type(value))
        return value

    return tensors, {key: walk(value, key) for key, value in state.items()}


def unflatten_state(tensors: Tensors, value: Any) -> Any:
    """The state from the two results of `flatten_state`."""
    if isinstance(value, list):
        return [unflatten_state(tensors, item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$dtype" in value:
        return getattr(torch, value["$dtype"])
    if "$tuple" in value:
        return tuple(unflatten_state(tensors, item) for item in value["$tuple"])
    items = value["$dict"] if "$dict" in value else value.items()
    return {key: unflatten_state(tensors, item) for key, item in items}


def random_states() -> State:
    """The states of the random generators of Python, NumPy and torch."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: State) -> None:
    """Sets the generators to the states that `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
