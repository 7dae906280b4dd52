"""Tables of a page: cells with the values that they sort by."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

NUMBER = re.compile(r"([+−-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?:[\s%]|$)", re.IGNORECASE)
MISSING = ("", "–")
FILTERED = 6  # lines from which a table has a filter
LONG = 40  # characters of a cell that may have several lines


@dataclass(frozen=True)
class PageTable:
    """A table of the page.

    Attributes:
        title: its caption.
        headings: headings of its columns; cells under "Run" that are a run's id are links.
        lines: texts of its cells.
        note: what its numbers mean.
        sort_values: values that cells sort by; if None, the first number of each text.
    """

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""
    sort_values: Sequence[Sequence[float | str | None]] | None = None


@dataclass(frozen=True)
class CellView:
    """A cell: its text, what it sorts by if not its text, where it leads to, its CSS class."""

    text: str
    order: str | None
    href: str | None
    kind: str


@dataclass(frozen=True)
class TableView:
    """A table as the template shows it."""

    table: PageTable
    anchor: str
    numeric: tuple[bool, ...]
    lines: tuple[tuple[CellView, ...], ...]
    is_sortable: bool
    is_filtered: bool


def table_view(
    table: PageTable,
    anchor: str,
    anchors: Mapping[str, str],
    line_anchors: Sequence[str] | None = None,
) -> TableView:
    """The table with the values that its cells sort by.

    A column is one of numbers if all its values are; missing values sort first.

    Args:
        table: what to show.
        anchor: its id in the page.
        anchors: ids in the page of runs, by the runs' ids.
        line_anchors: ids in the page that the first cells of the lines lead to.
    """
    values = table.sort_values
    if values is None:
        values = [[first_number(cell) for cell in line] for line in table.lines]
    numeric = tuple(
        all(is_number(line[i]) or line[i] in (None, *MISSING) for line in values)
        and any(is_number(line[i]) for line in values)
        for i in range(len(table.headings))
    )
    orders = [
        [_order(*cell) for cell in zip(found, numeric, texts, strict=True)]
        for found, texts in zip(values, table.lines, strict=True)
    ]
    differs = [
        any(order[i] != texts[i] for order, texts in zip(orders, table.lines, strict=True))
        for i in range(len(table.headings))
    ]
    lines = []
    for number, texts in enumerate(table.lines):
        cells = []
        for i, text in enumerate(texts):
            target = anchors.get(text) if table.headings[i] == "Run" else None
            if i == 0 and line_anchors is not None:
                target = line_anchors[number]
            order = orders[number][i] if differs[i] else None
            kind = "n" if numeric[i] else "long" if len(text) > LONG else ""
            cells.append(CellView(text, order, target and f"#{target}", kind))
        lines.append(tuple(cells))
    many = len(lines)
    return TableView(table, anchor, numeric, tuple(lines), many > 1, many >= FILTERED)


def first_number(text: str) -> float | str | None:
    """The number that a text starts with, if it does; None for a missing value."""
    if text in MISSING:
        return None
    found = NUMBER.match(text.strip("* "))
    return float(found[1].replace(",", "").replace("−", "-")) if found else text


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _order(value: float | str | None, in_numbers: bool, text: str) -> str:
    if value is None or value in MISSING:
        return ""
    if in_numbers:
        return repr(value)
    return value if isinstance(value, str) else text
