"""A table on a terminal of any width: columns that do not fit are named, not broken."""

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sret_cli.report.table import NOTHING, ReportTable

LEAST_TABLE_WIDTH = 60  # in less room, each line becomes a block of its own
WIDEST_WORDS = 24  # a column of words may be folded down to this width
SPACE = 3  # columns between two cells
MAIN = "top1_percent"  # what is left out last: top-1, and differences in it


def fitted_table(table: ReportTable, width: int = 200, title: str = "") -> Table | Group:
    """The table for a terminal of some width.

    Columns that do not fit are left out from the right, with a note that names them. Below 60
    columns, or where top-1 and the columns that tell the lines apart do not fit, each line is a
    block.
    """
    dropped = _dropped(table, width)
    kept = [i for i in range(len(table.columns)) if i not in dropped]
    lost = any(table.columns[index].startswith(MAIN) for index in dropped)
    if width < LEAST_TABLE_WIDTH or lost or _room(_width(table, i) for i in kept) > width:
        return blocks(table, title)
    if dropped:
        names = ", ".join(table.headings[index] for index in sorted(dropped))
        table = table.without(dropped, f"Not shown for want of room: {names}.")
    shown = Table(
        title=title or table.title or None,
        caption="\n".join(table.notes) or None,
        caption_justify="left",
        title_justify="left",
    )
    indices = range(len(table.columns))
    fits = _room(max(cell_len(table.headings[i]), _width(table, i)) for i in indices) <= width
    for index, heading in enumerate(table.headings):
        shown.add_column(
            heading,
            justify="right" if table.is_number(index) else "left",
            overflow="fold",
            width=None if fits else _width(table, index),
            min_width=_width(table, index),
        )
    for number, line in enumerate(table.lines):
        cells = [Text(c.full_text, style="bold") if c.bold else c.full_text for c in line]
        shown.add_row(*cells, end_section=number + 1 in table.blocks)
    return shown


def _dropped(table: ReportTable, width: int) -> list[int]:
    """The columns to leave out, so that the others fit: first those from the right."""
    indices = range(len(table.columns))
    last = [i for i in indices if table.columns[i].startswith(MAIN)]
    order = [i for i in reversed(indices) if i >= table.identity and i not in last] + last
    dropped: list[int] = []
    for index in order:
        if _room(_width(table, i) for i in indices if i not in dropped) <= width:
            break
        dropped.append(index)
    return dropped


def _room(widths: Iterable[int]) -> int:
    """The width of a table whose columns have some widths."""
    return 1 + sum(SPACE + width for width in widths)


def blocks(table: ReportTable, title: str = "") -> Group:
    """Each line of a table as lines of its own, `heading: value`; what is not known is left out."""
    parts: list[Text] = [Text(title or table.title)] if title or table.title else []
    for line in table.lines:
        texts = [
            f"{heading}: {cell.full_text}"
            for heading, cell in zip(table.headings, line, strict=True)
            if cell.text != NOTHING
        ]
        parts += [Text(""), *(Text(text, overflow="fold") for text in texts)]
    return Group(*parts, Text(""), *map(Text, table.notes))


def _width(table: ReportTable, index: int) -> int:
    """The width that a column needs so that no number is broken."""
    heading = max(map(cell_len, table.headings[index].split()), default=1)
    return max(heading, _least_width(table, index))


def _least_width(table: ReportTable, index: int) -> int:
    texts = [line[index].full_text for line in table.lines]
    words = max((cell_len(word) for text in texts for word in text.split()), default=1)
    whole = max(map(cell_len, texts), default=1)
    return whole if table.is_number(index) else min(whole, max(words, WIDEST_WORDS))
