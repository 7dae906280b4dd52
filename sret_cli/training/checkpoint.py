"""Checkpoints: states on disk that are written atomically and verified when they are read.

`checkpoint-<step>/` holds `tensors.safetensors`, `values.json` and `manifest.json`. The manifest is
written last and has the size and the SHA-256 of both files, and its own SHA-256. A folder without a
manifest was never finished and is ignored. The last checkpoint of a finished run has no copy of the
weights in the run's `model.safetensors` and `ema/`; its manifest has the size and the SHA-256 of
these files too. A tensor that a state names twice is stored once.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sret_cli.data.class_names import ClassList, config_classes
from sret_cli.runtime.errors import CHECKPOINT, SretError
from sret_cli.runtime.files import (
    make_directory,
    read_json,
    sync_directory,
    write_atomically,
)
from sret_cli.spec.run import CONFIG_FILE
from sret_cli.training.state import State, Tensors, flatten_state, unflatten_state

TENSORS_FILE, VALUES_FILE, MANIFEST_FILE = "tensors.safetensors", "values.json", "manifest.json"
PREFIX = "checkpoint-"
KEEP = 2
# Parts of a state that a finished run also has in files of weights; paths from a checkpoint.
WEIGHTS = {"model": "../model.safetensors", "ema": "../ema/model.safetensors"}


class Checkpoint(NamedTuple):
    """A state that was read, and its folder."""

    path: Path
    state: State


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread, one after another, and keeps the newest.

    `path` is the checkpoint that the run resumes from, if it does. It and those before it stay
    until newer ones are durable; all others are damaged or unfinished, and are then removed.
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
        """Copies a state and writes it in the background; waits for the checkpoint before it.

        Args:
            step: the number of the checkpoint; if it was the last to be written, nothing is done.
            state: the tree; it may change as soon as this returns.
            sync: called before the manifest is written; has to make the metrics durable.
            finished: whether the run is finished and its weights are written. The checkpoint then
                refers to the files of weights, and is the only one that is kept.

        Raises:
            SretError: the checkpoint before could not be written.
        """
        self.wait()
        if step != self.step:
            tensors, values = flatten_state(state)
            self.pending = self.thread.submit(
                self._write,
                step=step,
                tensors=tensors,
                values=values,
                sync=sync,
                finished=finished,
            )
            self.step = step
        elif finished:
            self._keep(1)

    def check(self) -> None:
        """Raises the error of the checkpoint in the background, if it has failed by now."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint in the background is durable.

        Raises:
            SretError: it cannot be written, or the disk is full; the one before it is intact.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finishes the checkpoint in the background and ends the thread."""
        self.thread.shutdown()

    def _write(
        self, step: int, tensors: Tensors, values: Any, sync: Callable[[], None], finished: bool
    ) -> None:
        path = self.directory / f"{PREFIX}{step}"
        try:
            write_checkpoint(
                path=path, tensors=tensors, values=values, sync=sync, finished=finished
            )
        except SretError as error:
            shutil.rmtree(path, ignore_errors=True)
            intact = f"; {self.kept[-1]} is intact" if self.kept else ""
            raise SretError(f"{error}{intact}", error.code, status=error.status) from None
        self.kept = [*(p for p in self.kept if p != path), path]
        self._keep(1 if finished else KEEP)

    def _keep(self, count: int) -> None:
        """Removes all checkpoints except the newest `count`."""
        self.kept = self.kept[-count:]
        for other in checkpoint_folders(self.directory):
            if other not in self.kept:
                remove_checkpoint(other)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, the manifest first: without it, whatever is left is ignored."""
    (path / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def write_checkpoint(
    path: Path, tensors: Tensors, values: Any, sync: Callable[[], None], finished: bool = False
) -> None:
    """Writes the folder of a checkpoint, the manifest last; replaces the folder if it exists.

    With `finished`, tensors that are in the run's files of weights are left out.
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
    """The tensors that are not in the run's files of weights, and the bytes of these files."""
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
    """The size and the SHA-256 of a file, as the manifest has them."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest_bytes(files: Any) -> bytes:
    """The bytes of the manifest of these files."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": own}, indent=2) + "\n").encode()


def read_checkpoint(path: Path) -> State:
    """The state in the folder of a checkpoint; every byte is verified.

    Raises:
        SretError: the checkpoint is damaged; the message names the file.
    """

    def damaged(name: str, reason: str) -> SretError:
        return SretError(f"{path} is damaged ({name} {reason})", CHECKPOINT)

    def bytes_of(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise damaged(name, f"cannot be read: {error.strerror}") from None

    manifest = bytes_of(MANIFEST_FILE)
    own = {TENSORS_FILE, VALUES_FILE}
    try:
        files = json.loads(manifest)["files"]
        names = set(files)
        intact = manifest_bytes(files) == manifest and own <= names <= own | {*WEIGHTS.values()}
    except (ValueError, LookupError, TypeError):
        intact = False
    if not intact:
        raise damaged(MANIFEST_FILE, "is not what was written")
    contents = {name: bytes_of(name) for name in files}
    for name, expected in files.items():
        if len(contents[name]) != expected["bytes"]:
            raise damaged(name, f"has {len(contents[name]):,} bytes of {expected['bytes']:,}")
        if file_entry(contents[name]) != expected:
            raise damaged(name, "is not what was written: its SHA-256 differs")
    try:
        # `clone` aligns each tensor in memory as torch does; kernels may sum in another order else.
        tensors = {k: v.clone() for k, v in load(contents[TENSORS_FILE]).items()}
        for part, name in WEIGHTS.items():
            weights = load(contents[name]) if name in contents else {}
            tensors |= {f"{part}/{key}": value.clone() for key, value in weights.items()}
        return unflatten_state(tensors, json.loads(contents[VALUES_FILE]))
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise damaged(TENSORS_FILE, f"was written by another version: {error}") from None


def newest_checkpoint(directory: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run that is not damaged, or None if there are no checkpoints.

    Args:
        directory: the run's.
        note: called with a line about damaged checkpoints and the one that is used instead.

    Raises:
        SretError: all checkpoints are damaged.
    """
    reasons: list[str] = []
    for path in reversed(finished_checkpoints(directory)):
        try:
            checkpoint = Checkpoint(path, read_checkpoint(path))
        except SretError as error:
            reasons.append(str(error))
            continue
        if reasons:
            note(f"{'; '.join(reasons)}; resuming from {path}")
        return checkpoint
    if reasons:
        raise SretError(
            f"{'; '.join(reasons)}; no checkpoint is left to resume from; remove {directory} "
            "to start the run again",
            CHECKPOINT,
        )
    return None


def finished_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run that have a manifest, ordered by their steps."""
    return [path for path in checkpoint_folders(directory) if (path / MANIFEST_FILE).exists()]


def trained_classes(directory: Path, continues: str | None) -> ClassList | None:
    """The classes that a run with checkpoints has trained on; None without checkpoints.

    They keep their numbers, whatever order the data have now. `continues` is the field of the run.
    """
    sources = [directory] if continues is None else [directory, directory.parent / continues]
    source = next((found for found in sources if finished_checkpoints(found)), None)
    if source is None or not (source / CONFIG_FILE).is_file():
        return None
    names = config_classes(read_json(source / CONFIG_FILE))
    if names is None:
        return None
    return ClassList(
        names=names,
        owner=f"the run {source}",
        remedy=f"put the classes back, or remove {source} to start again",
        code=CHECKPOINT,
    )


def checkpoint_folders(directory: Path) -> list[Path]:
    """The folders of checkpoints of a run, finished or not, ordered by their steps."""
    found = directory.glob(f"{PREFIX}*")
    return sorted(
        (p for p in found if p.name.removeprefix(PREFIX).isdecimal()), key=checkpoint_step
    )


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))
