"""The points of a study: every combination of `[grid]`, `[zip]` and `[[runs]]`.

A key stands in one of the three tables, and an axis has each value once: otherwise combinations
would replace each other, and runs be lost.
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
    """A table's name as it is written in a study."""
    return "[[runs]]" if place == "runs" else f"[{place}]"


def shown(point: Table) -> str:
    """A point as a text, in the words of the study."""
    return ", ".join(f"{key} = {value!r}" for key, value in point.items()) or "no values"


def places(tables: Table) -> dict[str, str]:
    """The table of each key that a point has a value of.

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
                    f"{key} is in {written(found[key])} and in {written(place)}, and a run takes "
                    "one value of it; leave one of the two out"
                )
            found[key] = place
    return found


def points(tables: Table) -> Iterator[Table]:
    """Every point of the study: values of the grid's product, the zip's row, and the listed run.

    Raises:
        SretError: a key or a value cannot be, or a value or row is there twice.
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
        raise SretError(f"[zip] axes move together and must be as long as each other: {lengths}")
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
    """Refuses a list that has a value twice.

    Raises:
        SretError: the message names the place and the value.
    """
    for index, value in enumerate(values):
        if value in values[:index]:
            raise SretError(f"{place} has {value!r} twice; leave one out")


def named_list(key: str, value: Any, what: str) -> list[str]:
    """The value, which is to be a list of names, each of them once.

    Raises:
        SretError: it is not; the message says of what a list is to be given.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SretError(f"{key} = {value!r}: give a list of {what}")
    refuse_repeated(key, value)
    return value


def is_timm_argument(key: str) -> bool:
    """Whether a key is `model.timm_args.NAME`; timm's model says whether it takes the argument."""
    start, _, name = key.rpartition(".")
    return start == "model.timm_args" and name.isidentifier()


def field_keys() -> list[str]:
    """The keys that `--set` and the axes of a study take, such as model.layers and train.lr."""
    keys = [f"model.{k}" for k in dict.fromkeys((*MODEL_KEYS, *BACKBONE_KEYS))]
    return keys + [f"train.{k}" for k in TrainSpec.model_fields]


def check_key(place: str, key: str) -> None:
    """Refuses a key that names no field of a model or of a training.

    Raises:
        SretError: the message names the nearest key.
    """
    keys = field_keys()
    if key not in keys and not is_timm_argument(key):
        hint = f'; write it in quotes, "{key}.…"' if key in ("model", "train") else ""
        raise SretError(f"{place} unknown key {key!r}{hint}; {nearest_choice(key, keys)}")
