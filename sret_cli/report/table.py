"""A table of a report, before it is text: what each cell holds, and how people read it.

Terminal, Markdown, LaTeX, JSON and HTML are views of one `ReportTable`, so that they cannot
disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sret_cli.runtime.signs import in_one_line

if TYPE_CHECKING:
    import pandas as pd

NOTHING = "–"  # what was not measured


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: the cell as people read it, in the unit of its heading.
        value: the value in its own unit: a number, text, tuple, or None; lines sort by it.
        half_width: half of the interval around a mean of seeds, in the value's unit.
        interval: the ends of an interval around a single value, in the value's unit.
        interval_text: that interval as people read it.
        n: the number of runs behind a mean.
        bold: whether the cell stands out.
    """

    text: str
    value: Any = None
    half_width: float | None = None
    interval: tuple[float, float] | None = None
    interval_text: str = ""
    n: int | None = None
    bold: bool = False

    @property
    def full_text(self) -> str:
        """The text with the interval of a single value behind it."""
        return f"{self.text} {self.interval_text}".rstrip()


@dataclass(frozen=True)
class ReportTable:
    """Headings and lines of a table, with what has to be said about them.

    Attributes:
        title: what the table shows.
        columns: name of each column, as rows have it.
        headings: the same for people.
        lines: the cells, line by line.
        notes: sentences under the table: units, intervals, seeds, what all lines share.
        blocks: indices of the lines before which a new block starts, such as the twins.
        identity: how many of the first columns tell the lines apart; they are never dropped.
    """

    title: str
    columns: tuple[str, ...]
    headings: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    identity: int = 1

    def texts(self) -> list[list[str]]:
        """The lines as people read them."""
        return [[cell.full_text for cell in line] for line in self.lines]

    def is_number(self, index: int) -> bool:
        """Whether a column holds numbers, which align to the right."""
        texts = [line[index].text for line in self.lines]
        return bool(texts) and all(is_number(text) for text in texts)

    def without(self, indices: Sequence[int], note: str = "") -> "ReportTable":
        """The table without some columns, and with a note about them."""
        kept = [i for i in range(len(self.columns)) if i not in indices]
        return ReportTable(
            title=self.title,
            columns=tuple(self.columns[i] for i in kept),
            headings=tuple(self.headings[i] for i in kept),
            lines=tuple(tuple(line[i] for i in kept) for line in self.lines),
            notes=(*self.notes, *[note] * bool(note)),
            blocks=self.blocks,
            identity=sum(index < self.identity for index in kept),
        )

    def records(self) -> list[dict[str, Any]]:
        """The lines as records: values in their own unit, with intervals and counts of runs.

        A mean over seeds has `<column>_low`, `<column>_high` and `<column>_n` next to it.
        """
        records = []
        for line in self.lines:
            record: dict[str, Any] = {}
            for column, cell in zip(self.columns, line, strict=True):
                record[column] = cell.value
                ends = cell.interval
                if cell.half_width is not None:
                    ends = cell.value - cell.half_width, cell.value + cell.half_width
                if ends is not None:
                    record |= {f"{column}_low": ends[0], f"{column}_high": ends[1]}
                if cell.n is not None:
                    record[f"{column}_n"] = cell.n
            records.append(record)
        return records

    def frame(self) -> "pd.DataFrame":
        """The records as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.records())


def text_table(
    headings: Sequence[str],
    lines: Sequence[Sequence[str]],
    title: str = "",
    notes: Sequence[str] = (),
) -> ReportTable:
    """A table whose cells are known as texts alone."""
    return ReportTable(
        title=title,
        columns=tuple(headings),
        headings=tuple(map(in_one_line, headings)),
        lines=tuple(tuple(Cell(in_one_line(text), text) for text in line) for line in lines),
        notes=tuple(notes),
    )


def is_number(text: str) -> bool:
    """Whether a cell shows a number, or nothing."""
    return text == NOTHING or text.lstrip("+-−")[:1].isdigit()
