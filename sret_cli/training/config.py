"""`config.json` of a run: its content, and whether a run may resume in its directory."""

import json
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import CHECKPOINT, SretError
from sret_cli.runtime.files import read_json, write_json
from sret_cli.spec.contents import CONTENTS_OF, Contents, without_places
from sret_cli.spec.run import CONFIG_FILE, HANDLING, Row, Run, is_later_default


def write_config(directory: Path, config: Row) -> None:
    """Writes `config.json` of a run; other keys of an existing file are kept.

    Raises:
        SretError: the existing file is of another run; the message names the keys.
    """
    path = directory / CONFIG_FILE
    if path.exists():
        found = read_json(path)
        refuse_other_config(f"{path}", found, config)
        config = {**found, **config}
    write_json(path, config)


def refuse_other_config(where: str, found: Any, config: Row) -> None:
    """Raises if a stored config has another model or training than `config`.

    The fields in `HANDLING` may differ, and the paths of data, weights and labels, but not their
    contents.

    Raises:
        SretError: they differ; the message names the keys that differ, with both values.
    """
    stored, wanted = _flat(found), _flat(config)
    differ = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if differ:
        values = ", ".join(f"{k} ({stored.get(k)!r}, not {wanted.get(k)!r})" for k in differ[:8])
        more = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise SretError(
            f"{where} is of another run: {values}{more} differ; use another directory", CHECKPOINT
        )


def _flat(config: Any) -> Row:
    """The fields of `model` and `train` that have to be equal, and the hashes of contents."""
    config = json.loads(json.dumps(config))
    tables = config if isinstance(config, dict) else {}
    train, contents = tables.get("train"), Contents.of(tables.get("contents"))
    if isinstance(train, dict) and {"dataset", *CONTENTS_OF} <= train.keys():
        tables = {**tables, "train": without_places(train, contents)}
    return {
        f"{table}.{key}": value
        for table in ("model", "train")
        for key, value in (tables.get(table) or {}).items()
        if not ((table == "train" and key in HANDLING) or is_later_default(key, value))
    }


def run_config(run: Run, classes: tuple[str, ...] | None = None) -> Row:
    """The content of `config.json` for a run, with the names of its classes if they are known."""
    config = {"study": run.study, "name": run.name, **run.spec()}
    if classes is not None:
        config["classes"] = list(classes)
    return config
