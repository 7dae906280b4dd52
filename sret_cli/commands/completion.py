"""What a shell offers after a flag: presets, datasets, recipes, choices and study files."""

import os
from collections.abc import Callable
from glob import escape, glob
from typing import Any

Complete = Callable[[str], list[str]]


def choices(*values: str) -> Complete:
    """A completion of one of these values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def presets(incomplete: str) -> list[str]:
    """Completes the name of a preset."""
    from sret_cli.spec.presets import PRESETS

    return choices(*PRESETS)(incomplete)


def datasets(incomplete: str) -> list[str]:
    """Completes the kind of a dataset."""
    from sret_cli.spec.train import DATASETS, NAMED

    return choices(*DATASETS, *(f"{kind}/" for kind in NAMED))(incomplete)


def recipes(incomplete: str) -> list[str]:
    """Completes the name of a recipe."""
    from sret_cli.spec.recipes import RECIPES

    return choices(*RECIPES)(incomplete)


def studies(incomplete: str) -> list[str]:
    """Completes a study file, here or one folder below; the shell completes other paths itself."""
    start = escape(os.path.expanduser(incomplete))
    found: list[Any] = sorted(glob(f"{start}*.toml") + glob(f"{start}*/*.toml"))
    return [path for path in found if os.path.isfile(path)]


DEVICES = choices("auto", "cpu", "cuda")
PRECISIONS = choices("fp32", "bf16")


def columns(incomplete: str) -> list[str]:
    """Completes the names of columns, after the last comma."""
    from sret_cli.study.where import known_columns

    before, comma, last = incomplete.rpartition(",")
    names = [name.partition(".")[2] or name for name in known_columns()]
    return [f"{before}{comma}{name}" for name in choices(*names)(last.removeprefix("-"))]


def conditions(incomplete: str) -> list[str]:
    """Completes the name of a column at the end of a condition."""
    before, space, last = incomplete.rpartition(" ")
    return [f"{before}{space}{name}" for name in columns(last)] if last else []
