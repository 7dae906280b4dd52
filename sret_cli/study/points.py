"""The points of a study: every combination of `[grid]`, `[zip]` and `[[runs]]`.

A key may stand in only one of the three tables, and an axis may have a value only once. Otherwise
combinations would replace each other, and runs would be lost.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from sret_cli.runtime.errors import SretError, nearest_choice
from sret_cli.spec.run import Table
from sret_cli.spec.train import TrainSpec
from sret_cli.study.resolve import BACKBONE_KEYS, MODEL_KEYS

AXES = ("grid", "zip", "runs")


def written(place: str) -> str:
    """The name of a table as a study file writes it."""
    return "[[runs]]" if place == "runs" else f"[{place}]"


def shown(point: Table) -> str:
    """A point as text, with the keys of the study file."""
    return ", ".join(f"{key} = {value!r}" for key, value in point.items()) or "no values"


def places(tables: Table) -> dict[str, str]:
    """The table in which each key of the points stands.

    Raises:
        SretError: two tables have the same key.
    """
    found: dict[str, str] = {}
    for place in AXES:
        table = tables.get(place, {})
        entries = table if place == "runs" else [table]
        for key in {k: None for entry in entries if isinstance(entry, dict) for k in entry}:
            if key in found:
                raise SretError(
                    f"{key} is in {written(found[key])} and in {written(place)}, but a run "
                    "has one value of it; leave one of the two out"
                )
            found[key] = place
    return found


def points(tables: Table) -> Iterator[Table]:
    """Every point: a combination of `[grid]`, a row of `[zip]` and an entry of `[[runs]]`.

    Raises:
        SretError: a key is unknown, a value is not a list, or a value or row appears twice.
    """
    grid, together = tables.get("grid", {}), tables.get("zip", {})
    for name, axes in (("grid", grid), ("zip", together)):
        for key, values in axes.items():
            check_key(f"[{name}]", key)
            if not isinstance(values, list) or not values:
                raise SretError(f"[{name}] {key!r} = {values!r}: give a list of values")
    for key, values in grid.items():
        refuse_repeated(f"[grid] {key}", values)
    lengths = {key: len(values) for key, values in together.items()}
    if len(set(lengths.values())) > 1:
        raise SretError(
            f"[zip] axes change together, so their lists must have the same length: {lengths}"
        )
    listed = tables.get("runs", [{}])
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise SretError(f"runs = {listed!r}: write each run as a table, [[runs]]")
        for key in entry:
            if key != "name":
                check_key(f"[[runs]] {number + 1}:", key)
            elif not isinstance(entry[key], str):
                raise SretError(f"[[runs]] {number + 1}: name = {entry[key]!r}: give a text")
    places(tables)
    rows = [list(values) for values in zip(*together.values(), strict=True)]
    refuse_repeated(f"[zip] {', '.join(together)}", rows if len(together) > 1 else sum(rows, []))
    zipped = [dict(zip(together, values, strict=True)) for values in rows] or [{}]
    crossed = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    for entry, row, combination in product(listed, zipped, crossed):
        yield {**row, **combination, **entry}


def refuse_repeated(place: str, values: list[Any]) -> None:
    """Raises if a list has a value twice.

    Raises:
        SretError: the message names the place and the value.
    """
    for index, value in enumerate(values):
        if value in values[:index]:
            raise SretError(f"{place} has {value!r} twice; leave one out")


def named_list(key: str, value: Any, what: str) -> list[str]:
    """The value, if it is a list of names without repetition.

    Raises:
        SretError: it is not; the message says what the list should contain.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SretError(f"{key} = {value!r}: give a list of {what}")
    refuse_repeated(key, value)
    return value


def is_timm_argument(key: str) -> bool:
    """Whether a key is `model.timm_args.NAME`; the timm model checks the argument itself."""
    start, _, name = key.rpartition(".")
    return start == "model.timm_args" and name.isidentifier()


def field_keys() -> list[str]:
    """All keys for `--set` and for the axes of a study, such as model.layers and train.lr."""
    keys = [f"model.{k}" for k in dict.fromkeys((*MODEL_KEYS, *BACKBONE_KEYS))]
    return keys + [f"train.{k}" for k in TrainSpec.model_fields]


def check_key(place: str, key: str) -> None:
    """Raises if a key names no field of a model or of a training.

    Raises:
        SretError: the message names the nearest key.
    """
    keys = field_keys()
    if key not in keys and not is_timm_argument(key):
        hint = f'; write it in quotes, "{key}.…"' if key in ("model", "train") else ""
        raise SretError(f"{place} unknown key {key!r}{hint}; {nearest_choice(key, keys)}")
