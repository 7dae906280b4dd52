"""Conditions on rows, such as `slices == 4 and layers >= 8`, without running any code.

A condition compares columns with literals; comparisons are joined by `and`, `or` and `not`. It is
parsed by Python's own parser and then read node by node; nothing of it is ever evaluated.
"""

import ast
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sret_cli.runtime.errors import USAGE, SretError, nearest_choices
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.run import Row
from sret_cli.spec.train import TrainSpec
from sret_cli.study.points import is_timm_argument
from sret_cli.study.resolve import BACKBONE_KEYS
from sret_cli.study.rows import MEASUREMENTS, OUTCOME

LONGEST = 2_000  # characters of a condition
IDENTITY = ("study", "name", "role", "run_id", "twin_of", "continues")
ALIASES = {
    "accuracy": "top1_percent",
    "flops": "macs",
    "learning_rate": "train.lr",
    "seed": "train.seed",
    "top1": "top1_percent",
    "top5": "top5_percent",
}
FIELDS = (
    *(f"model.{field}" for field in dict.fromkeys((*ModelSpec.model_fields, *BACKBONE_KEYS))),
    *(f"train.{field}" for field in TrainSpec.model_fields),
)
WORDS = {"true": True, "false": False, "none": None}
OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, options: value in options,
    ast.NotIn: lambda value, options: value not in options,
}
MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}
EXAMPLE = "compare columns with values, as in 'slices == 4 and layers >= 8'"


@dataclass(frozen=True)
class Condition:
    """A condition on rows: its text, and the function that tests a row."""

    text: str
    holds: Callable[[Row], bool]


def known_columns(rows: Sequence[Row] = ()) -> list[str]:
    """All columns that a row can have, and those that the given rows have."""
    found = dict.fromkeys((*IDENTITY, *MEASUREMENTS, *OUTCOME, *FIELDS))
    return list(found | dict.fromkeys(key for row in rows for key in row))


def column_named(name: str, known: Iterable[str]) -> str:
    """The column of a name, in which `model.` and `train.` may be left out.

    Raises:
        SretError: no column has this name.
    """
    columns = list(known)
    if is_timm_argument(name):
        return name
    for candidate in (name, f"model.{name}", f"train.{name}", ALIASES.get(name)):
        if candidate in columns:
            return candidate
    names = [*ALIASES, *columns, *(column.partition(".")[2] for column in columns if "." in column)]
    raise SretError(f"no column {name!r}; {nearest_choices(name, names)}", USAGE)


def parse_condition(text: str, rows: Sequence[Row] = ()) -> Condition:
    """Reads a condition.

    A field with a value for each stage meets a comparison if all its stages do; a row without a
    value meets only `!=`, `not in` and `== none`.

    Args:
        text: the condition.
        rows: rows whose columns may be used besides those that every row has.

    Raises:
        SretError: the text is not a condition, or names a column that does not exist.
    """
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    if len(text) > LONGEST:
        raise SretError(f"the condition {shown!r} is over {LONGEST:,} characters long", USAGE)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return Condition(text, _reader(tree, known_columns(rows), shown))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SretError(f"{shown!r} is not a condition; {EXAMPLE}", USAGE) from None


def rows_where(rows: Sequence[Row], text: str | None) -> list[Row]:
    """The rows that meet a condition; all rows without one.

    Raises:
        SretError: the text is not a condition.
    """
    if text is None:
        return list(rows)
    condition = parse_condition(text, rows)
    return [row for row in rows if condition.holds(row)]


def _reader(node: ast.expr, known: list[str], text: str) -> Callable[[Row], bool]:
    """The function that tests a row for a node of a condition."""
    match node:
        case ast.BoolOp(op=op, values=values):
            parts = [_reader(value, known, text) for value in values]
            joined = all if isinstance(op, ast.And) else any
            return lambda row: joined(part(row) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _reader(operand, known, text)
            return lambda row: not inner(row)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [left, *comparators]
            links = zip(sides, ops, sides[1:], strict=False)
            tests = [_comparison(*link, known=known, text=text) for link in links]
            return lambda row: all(test(row) for test in tests)
    raise SretError(f"{text!r} is not a condition; {EXAMPLE}", USAGE)


def _comparison(
    left: ast.expr, op: ast.cmpop, right: ast.expr, *, known: list[str], text: str
) -> Callable[[Row], bool]:
    name, other, kind = _name(left), right, type(op)
    if name is None and kind in MIRRORED:  # a literal first, as in 4 <= layers
        name, other, kind = _name(right), left, MIRRORED[kind]
    if name is None or kind not in OPERATORS:
        raise SretError(f"{text!r} does not compare a column with a value; {EXAMPLE}", USAGE)
    if _name(other) is not None:
        quoted = f'"{_name(other)}"'
        raise SretError(
            f"{text!r} compares two columns; write a text in quotation marks, as in "
            f"{name} == {quoted}",
            USAGE,
        )
    column, literal, compare = column_named(name, known), _literal(other, text), OPERATORS[kind]
    if kind in (ast.In, ast.NotIn) and not isinstance(literal, tuple):
        raise SretError(f"{text!r}: write a list after `in`, as in layers in [4, 8]", USAGE)
    ordered = kind in (ast.Lt, ast.LtE, ast.Gt, ast.GtE)

    def test(row: Row) -> bool:
        value = _value(row, column)
        if ordered and value is None:
            return False
        stages = isinstance(value, tuple) and not (isinstance(literal, tuple) and not ordered)
        if isinstance(value, tuple) and kind in (ast.In, ast.NotIn):
            stages = not any(isinstance(option, tuple) for option in literal)
        if kind in (ast.NotEq, ast.NotIn) and stages:
            equal = operator.eq if kind is ast.NotEq else OPERATORS[ast.In]
            return not all(equal(item, literal) for item in value)
        try:
            return (
                all(compare(item, literal) for item in value) if stages else compare(value, literal)
            )
        except TypeError:
            raise SretError(
                f"{text!r}: {column} is {value!r} in a row, which has no order with {literal!r}",
                USAGE,
            ) from None

    return test


def _name(node: ast.expr) -> str | None:
    """The dotted name that a node writes, unless it is one of the words true, false and none."""
    match node:
        case ast.Name(id=name):
            return None if name.lower() in WORDS else name
        case ast.Attribute(value=value, attr=attribute):
            inner = _name(value)
            return None if inner is None else f"{inner}.{attribute}"
    return None


def _literal(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Name(id=name) if name.lower() in WORDS:
            return WORDS[name.lower()]
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_literal(item, text) for item in items)
    raise SretError(f"{text!r} does not compare a column with a value; {EXAMPLE}", USAGE)


def _value(row: Row, column: str) -> Any:
    value = row.get(column)
    return tuple(value) if isinstance(value, list) else value
