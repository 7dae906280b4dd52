"""Resumable states on disk: written atomically, verified when they are read, never executed.

`checkpoint-<step>/` holds `tensors.safetensors`, `values.json` and, written last, `manifest.json`,
which has the size and the SHA-256 of both and of itself. A folder without a manifest was never
finished, and counts as nothing. The last checkpoint of a finished run has no copy of the weights
that are in the run's `model.safetensors` and `ema/`: its manifest has the size and the SHA-256 of
these files, too. A state is a tree of dicts, lists and tuples whose leaves are tensors and plain
values; tensors that are one in memory are one in the file.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sret_cli.data.class_names import ClassList, config_classes
from sret_cli.runtime.errors import CHECKPOINT, SretError
from sret_cli.runtime.files import (
    make_directory,
    read_json,
    sync_directory,
    write_atomically,
)
from sret_cli.spec.run import CONFIG_FILE

TENSORS_FILE, VALUES_FILE, MANIFEST_FILE = "tensors.safetensors", "values.json", "manifest.json"
PREFIX = "checkpoint-"
KEEP = 2
# Parts of a state whose tensors a finished run has in files of weights, seen from a checkpoint.
WEIGHTS = {"model": "../model.safetensors", "ema": "../ema/model.safetensors"}

State = dict[str, Any]
Tensors = dict[str, Tensor]


class Checkpoint(NamedTuple):
    """A state that was read, and the folder that it was read from."""

    path: Path
    state: State


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread, one after another, and keeps the newest.

    `path` is the checkpoint that the run goes on from, if it does: it and those before it stay
    until newer ones are durable, and all others, damaged or unfinished, are then removed.
    """

    def __init__(self, directory: Path, path: Path | None = None) -> None:
        self.directory = directory
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        step = -1 if path is None else checkpoint_step(path)
        self.kept = [p for p in finished_checkpoints(directory) if checkpoint_step(p) <= step]
        self.step = step

    def write(
        self, step: int, state: State, sync: Callable[[], None], finished: bool = False
    ) -> None:
        """Copies a state and has it written in the background; waits for the one before.

        Args:
            step: the number of the checkpoint; one that was the last to be written is left alone.
            state: the tree; it may change as soon as this returns.
            sync: called before the manifest is written, to make durable what it stands for.
            finished: whether it is the last one of a run whose weights are written: it takes them
                from their files, and is then the only one that is kept.

        Raises:
            SretError: the checkpoint before could not be written.
        """
        self.wait()
        if step != self.step:
            tensors, values = flatten_state(state)
            self.pending = self.thread.submit(self._write, step, tensors, values, sync, finished)
            self.step = step
        elif finished:
            self._keep(1)

    def check(self) -> None:
        """Raises what the writing of a checkpoint failed with, if it has."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint under way is durable.

        Raises:
            SretError: it cannot be written, or the disk is full; the one before it is intact.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread, when it has written what is under way."""
        self.thread.shutdown()

    def _write(
        self, step: int, tensors: Tensors, values: Any, sync: Callable[[], None], finished: bool
    ) -> None:
        path = self.directory / f"{PREFIX}{step}"
        try:
            write_checkpoint(path, tensors, values, sync, finished)
        except SretError as error:
            shutil.rmtree(path, ignore_errors=True)
            intact = f"; {self.kept[-1]} is intact" if self.kept else ""
            raise SretError(f"{error}{intact}", error.code, status=error.status) from None
        self.kept = [*(p for p in self.kept if p != path), path]
        self._keep(1 if finished else KEEP)

    def _keep(self, count: int) -> None:
        """Removes all but so many checkpoints, the newest."""
        self.kept = self.kept[-count:]
        for other in checkpoint_folders(self.directory):
            if other not in self.kept:
                remove_checkpoint(other)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint: without its manifest it counts as nothing, whatever else is left."""
    (path / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def flatten_state(state: State) -> tuple[Tensors, Any]:
    """Copies of a state's tensors on the CPU, by name, and the tree as JSON that names them."""
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
    """The state that `flatten_state` took apart."""
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


def write_checkpoint(
    path: Path, tensors: Tensors, values: Any, sync: Callable[[], None], finished: bool = False
) -> None:
    """Writes one checkpoint's folder, the manifest last; one that is there is written anew.

    Tensors that a finished run's files of weights have are left to these files.
    """
    (path / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    make_directory(path)
    tensors, weights = _without_weights(path, tensors) if finished else (tensors, {})
    contents = {
        TENSORS_FILE: save(tensors),
        VALUES_FILE: json.dumps(values, allow_nan=False).encode(),
    }
    for name, data in contents.items():
        write_atomically(path / name, data)
    contents |= weights
    sync_directory(path.parent)
    sync()
    write_atomically(
        path / MANIFEST_FILE, manifest_bytes({k: file_entry(v) for k, v in contents.items()})
    )


def _without_weights(path: Path, tensors: Tensors) -> tuple[Tensors, dict[str, bytes]]:
    """The tensors that are not in the run's files of weights, and what is in these files."""
    files = {}
    for part, name in WEIGHTS.items():
        own = {key: value for key, value in tensors.items() if key.startswith(f"{part}/")}
        if own and (path / name).is_file():
            data = (path / name).read_bytes()
            stored = {f"{part}/{key}": value for key, value in load(data).items()}
            if all(key in stored and torch.equal(stored[key], own[key]) for key in own):
                files[name] = data
                tensors = {key: value for key, value in tensors.items() if key not in own}
    return tensors, files


def file_entry(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest_bytes(files: Any) -> bytes:
    """The manifest of files: no other bytes stand for it."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": own}, indent=2) + "\n").encode()


def read_checkpoint(path: Path) -> State:
    """The state in a checkpoint's folder, of which every byte is verified.

    Raises:
        SretError: it is damaged; the message names the file.
    """

    def damaged(name: str, reason: str) -> SretError:
        return SretError(f"{path} is damaged ({name} {reason})", CHECKPOINT)

    def bytes_of(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise damaged(name, f"cannot be read: {error.strerror}") from None

    whole = bytes_of(MANIFEST_FILE)
    own = {TENSORS_FILE, VALUES_FILE}
    try:
        files = json.loads(whole)["files"]
        sound = manifest_bytes(files) == whole and own <= set(files) <= own | set(WEIGHTS.values())
    except (ValueError, LookupError, TypeError):
        sound = False
    if not sound:
        raise damaged(MANIFEST_FILE, "is not what was written")
    contents = {name: bytes_of(name) for name in files}
    for name, expected in files.items():
        if len(contents[name]) != expected["bytes"]:
            raise damaged(name, f"has {len(contents[name]):,} bytes of {expected['bytes']:,}")
        if file_entry(contents[name]) != expected:
            raise damaged(name, "is not what was written: its SHA-256 differs")
    try:
        # Copies lie where torch aligns them, so that no kernel sums in another order.
        tensors = {k: v.clone() for k, v in load(contents[TENSORS_FILE]).items()}
        for part, name in WEIGHTS.items():
            weights = load(contents[name]) if name in contents else {}
            tensors |= {f"{part}/{key}": value.clone() for key, value in weights.items()}
        return unflatten_state(tensors, json.loads(contents[VALUES_FILE]))
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise damaged(TENSORS_FILE, f"is of another version: {error}") from None


def newest_checkpoint(directory: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that is sound, or None where there is none at all.

    Args:
        directory: the run's.
        note: is told which are damaged and which one is taken in their place.

    Raises:
        SretError: there are some, and all of them are damaged.
    """
    reasons: list[str] = []
    for path in reversed(finished_checkpoints(directory)):
        try:
            checkpoint = Checkpoint(path, read_checkpoint(path))
        except SretError as error:
            reasons.append(str(error))
            continue
        if reasons:
            note(f"{'; '.join(reasons)}; going on from {path}")
        return checkpoint
    if reasons:
        raise SretError(
            f"{'; '.join(reasons)}; no checkpoint is left to go on from: remove {directory} to "
            "start the run over",
            CHECKPOINT,
        )
    return None


def finished_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run that have a manifest, by their steps."""
    return [path for path in checkpoint_folders(directory) if (path / MANIFEST_FILE).exists()]


def trained_classes(directory: Path, continues: str | None) -> ClassList | None:
    """The classes that a run, which goes on from a checkpoint, has trained on; else None.

    They keep their numbers, whatever order the data give them now. `continues` is the run's.
    """
    sources = [directory] if continues is None else [directory, directory.parent / continues]
    source = next((found for found in sources if finished_checkpoints(found)), None)
    if source is None or not (source / CONFIG_FILE).is_file():
        return None
    names = config_classes(read_json(source / CONFIG_FILE))
    remedy = f"put the classes back, or remove {source} to start over"
    return None if names is None else ClassList(names, f"the run {source}", remedy, CHECKPOINT)


def checkpoint_folders(directory: Path) -> list[Path]:
    """The folders of checkpoints in a run's directory, finished or not, by their steps."""
    found = directory.glob(f"{PREFIX}*")
    return sorted(
        (p for p in found if p.name.removeprefix(PREFIX).isdecimal()), key=checkpoint_step
    )


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))


def random_states() -> State:
    """The states of Python's, NumPy's and torch's generators."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: State) -> None:
    """Puts the generators back to what `random_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
