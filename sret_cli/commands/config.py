"""A user's defaults for engines: `~/.config/sret/config.toml`, or the file that $SRET_CONFIG names.

Nothing in it can change what a run does, and so no run id depends on it.
"""

import os
import tomllib
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import USAGE, SretError, nearest_choice

VARIABLE = "SRET_CONFIG"
# The keys of the file, and what their values are.
KEYS: dict[str, tuple[type, ...]] = {
    "engine": (str,),
    "jobs": (int, str),
    "gpus_per_run": (int,),
    "runs_per_gpu": (int,),
    "retries": (int,),
    "address": (str,),
    "slurm": (dict,),
}


def config_path() -> Path:
    """The file of a user's defaults; it need not exist."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "sret" / "config.toml"


def user_defaults() -> dict[str, Any]:
    """The defaults of the user's file, with `slurm` as texts such as "partition=gpu".

    Raises:
        SretError: the file is not TOML, or a key or value in it is wrong.
    """
    path = config_path()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if os.environ.get(VARIABLE):
            raise SretError(f"{VARIABLE} names {path}, which does not exist", USAGE) from None
        return {}
    except OSError as error:
        raise SretError(f"cannot read {path}: {error.strerror}", USAGE) from None
    except ValueError as error:
        raise SretError(f"{path} is not TOML: {error}", USAGE) from None
    for key, value in found.items():
        if key not in KEYS:
            raise SretError(f"{path}: no key {key!r}; {nearest_choice(key, list(KEYS))}", USAGE)
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            kinds = " or ".join({"dict": "table"}.get(k.__name__, k.__name__) for k in KEYS[key])
            raise SretError(f"{path}: {key} = {value!r}: give a value of type {kinds}", USAGE)
    if "slurm" in found:
        found["slurm"] = [f"{key}={value}" for key, value in found["slurm"].items()]
    if "jobs" in found:
        found["jobs"] = str(found["jobs"])
    return found
