"""Paths in flags and study files: what relative paths are relative to, and whether they exist.

A relative path in a study file is relative to the study file or, if it does not exist there, to the
working directory. A relative path in a flag is relative to the working directory.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import CHECKPOINT, DATA, SretError

PATH_FIELDS = ("data_dir", "init", "teacher", "teacher_checkpoint", "soft_labels")


def place_paths(train: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A `[train]` table from a study file in `folder`, with paths that this process can open."""
    return {
        key: _place(value, folder) if key in PATH_FIELDS and isinstance(value, str) else value
        for key, value in train.items()
    }


def _place(value: str, folder: Path) -> str:
    path = os.path.expanduser(value)
    beside = os.path.join(folder, path)
    if not os.path.exists(beside) or (os.path.exists(path) and os.path.samefile(beside, path)):
        return value
    return beside


def check_path(field: str, value: Any, folder: Path | None = None) -> None:
    """Raises if a path of a training does not exist.

    Args:
        field: one of PATH_FIELDS; a teacher may also be the name of a timm model.
        value: the field's value.
        folder: the folder of the study file, if the path comes from one.

    Raises:
        SretError: the path does not exist; the message names the places that were searched.
    """
    if not isinstance(value, str) or value == "none" or os.path.exists(os.path.expanduser(value)):
        return
    if field == "teacher" and (os.sep not in value or ":" in value):
        return
    searched = ""
    if not os.path.isabs(os.path.expanduser(value)):
        places = [f"the working directory ({os.getcwd()})"]
        if folder is not None and folder.absolute() != Path.cwd():
            places.insert(0, f"the study file ({folder.absolute()})")
        searched = f"; a relative path is relative to {' or to '.join(places)}"
    code = DATA if field in ("data_dir", "soft_labels") else CHECKPOINT
    raise SretError(f"{field} = {value!r} does not exist{searched}", code)
