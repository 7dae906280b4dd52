"""Every key of a study file, with its type, default and meaning, read from the specs themselves.

`python -m sret_cli.study.keys docs/studies.md` writes the reference into a page, between two
marker comments.
"""

import json
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sret_cli.runtime.files import write_atomically
from sret_cli.spec.backbone import Arguments, BackboneSpec
from sret_cli.spec.model import PER_STAGE, ModelSpec
from sret_cli.spec.strict import Strict
from sret_cli.spec.train import TrainSpec
from sret_cli.study.view import FigureSpec, ReportSpec

NOTHING = "–"  # where a key has no default
START = "<!-- keys: `python -m sret_cli.study.keys docs/studies.md` writes what follows -->"
END = "<!-- end of keys -->"

STUDY, MODEL, BACKBONE, TRAIN, REPORT, FIGURES = (
    "A study file",
    "[model]",
    "[model] with a backbone",
    "[train]",
    "[report]",
    "[[report.figures]]",
)
NOTES = {
    STUDY: "Tables and lists of a file; at least one of those other than [report].",
    MODEL: "Defaults are those of the preset `deep`; another preset brings its own.",
    BACKBONE: "Keys of [model] for a timm model.",
    TRAIN: "Defaults suit `nano` on `digits`; a recipe brings its own.",
    REPORT: "Columns are measurements, such as `top1_percent`, or fields of a spec: `train.lr`, or "
    "`lr` for short. `sret report` has these keys as flags.",
    FIGURES: "Each entry is one figure.",
}
WORDS = {
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
}


@dataclass(frozen=True)
class Key:
    """One key of a table of a study file; the default is written as in TOML."""

    table: str
    name: str
    type: str
    default: str
    meaning: str


TWINS = '"layers", "params" or "macs"'
STRUCTURE = (
    Key(STUDY, "twins", f"list of {TWINS}", "[]", "Adds controls without sharing for each run."),
    Key(STUDY, "baselines", "list of texts", "[]", "Adds timm models, unchanged, by their names."),
    Key(STUDY, "[model]", "table", NOTHING, "What all models have in common."),
    Key(STUDY, "[train]", "table", NOTHING, "How models are trained; without it, none is trained."),
    Key(
        STUDY,
        "[grid]",
        "lists by key",
        NOTHING,
        'All combinations of the values of its keys, such as "model.recursions" = [1, 2, 4].',
    ),
    Key(
        STUDY,
        "[zip]",
        "lists by key",
        NOTHING,
        "Values that change together: the first of each list, then the second, and so on.",
    ),
    Key(
        STUDY,
        "[[runs]]",
        "list of tables",
        NOTHING,
        'Values by key, such as "train.lr" = 1e-3, and a `name` for the runs. Each entry is '
        "combined with every point of [grid] and [zip].",
    ),
    Key(STUDY, "[report]", "table", NOTHING, "What the tables and figures show."),
)
# Keys of [model] that are not fields of a spec, since each sets several fields.
SHORTHANDS = (
    Key(MODEL, "preset", "text", '"deep"', 'Named model; "nano" if the runs train on digits.'),
    Key(
        MODEL,
        "layers",
        "whole number",
        NOTHING,
        "Total layers; sets `recursions`, in proportion to what they are.",
    ),
    Key(
        MODEL,
        "params",
        "number or text",
        NOTHING,
        'Parameters to reach within 1 % by the width: 14e6 or "14M".',
    ),
    Key(
        MODEL,
        "macs",
        "number or text",
        NOTHING,
        'FLOPs to reach within 1 % by the width: 4.2e9 or "4.2G".',
    ),
    Key(
        MODEL,
        "twin",
        TWINS,
        NOTHING,
        "Takes the control without sharing instead, with equal layers, parameters or FLOPs.",
    ),
)


def study_keys() -> list[Key]:
    """All keys of a study file, table by table."""
    return [
        *STRUCTURE,
        *SHORTHANDS,
        *spec_keys(MODEL, ModelSpec),
        *spec_keys(BACKBONE, BackboneSpec),
        *spec_keys(TRAIN, TrainSpec),
        *spec_keys(REPORT, ReportSpec),
        *spec_keys(FIGURES, FigureSpec),
    ]


def spec_keys(table: str, spec: type[Strict]) -> Iterator[Key]:
    """The fields of a spec as keys of a table."""
    for name, field in spec.model_fields.items():
        if spec is ModelSpec and name in PER_STAGE:
            one = type_words(get_args(field.annotation)[0])
            words = f"{one}, or a list of one for each stage"
        else:
            words = type_words(field.annotation, field.metadata)
        meaning = " ".join((field.description or "").split())
        default = NOTHING if field.is_required() else toml_value(field.default)
        default = "{}" if field.annotation == Arguments else default
        yield Key(table, name, words, default, meaning)


def type_words(annotation: Any, constraints: Sequence[Any] = (), plural: bool = False) -> str:
    """A type in words, such as "list of whole numbers, each at least 1".

    Args:
        annotation: the type of a field, or of a value in it.
        constraints: pydantic's bounds on the value.
        plural: whether the words are for several such values.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == Arguments:
        return "table"
    if annotation is FigureSpec:
        return "tables" if plural else "table"
    if origin is Annotated:
        inner, *infos = arguments
        bounds = [bound for info in infos for bound in info.metadata]
        return type_words(inner, bounds, plural)
    if origin is Literal:
        return either(map(toml_value, arguments))
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not types.NoneType]
        choices = [get_args(kind) for kind in kinds if get_origin(kind) is Literal]
        others = [type_words(k, constraints) for k in kinds if get_origin(k) is not Literal]
        return either([*map(toml_value, chain(*choices)), *others])
    if origin is tuple:
        items = type_words(arguments[0], plural=True)
        if arguments[-1] is Ellipsis:
            return f"{'lists' if plural else 'list'} of {items}"
        return f"{len(arguments)} {items}"
    return WORDS[annotation][plural] + range_words(constraints, plural)


def range_words(constraints: Iterable[Any], plural: bool) -> str:
    """Pydantic's bounds in words, such as " from 1 to 64" or ", above 0 and below 1"."""
    limits = {
        name: getattr(constraint, name)
        for constraint in constraints
        for name in ("ge", "gt", "le", "lt")
        if hasattr(constraint, name)
    }
    if limits.keys() == {"ge", "le"}:
        return f" from {limits['ge']:,} to {limits['le']:,}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{word} {limits[name]:,}" for name, word in words.items() if name in limits]
    if not parts:
        return ""
    return (", each " if plural else ", ") + " and ".join(parts)


def either(words: Iterable[str]) -> str:
    """Alternatives as a list in words: "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def toml_value(value: Any) -> str:
    """A default as it is written in TOML; `NOTHING` for None."""
    return NOTHING if value is None else json.dumps(value)


def markdown_reference() -> str:
    """All keys as Markdown, a table for each table of the file."""
    keys, lines = study_keys(), []
    for table, note in NOTES.items():
        lines += [f"### {table}", "", note, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            if key.table == table:
                default = key.default if key.default == NOTHING else f"`{key.default}`"
                cells = (f"`{key.name}`", key.type, default, key.meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def with_reference(page: str) -> str:
    """A page with the reference between its two marker comments, in place of what is there."""
    head, _, rest = page.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n\n{markdown_reference()}\n{END}{tail}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_atomically(path, with_reference(path.read_text(encoding="utf-8")))
