"""A table as text for files: Markdown, LaTeX, HTML, JSON; and rows as CSV.

Everything that comes from a spec or from the outside, such as names of runs, is escaped for the
format that it goes to.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from sret_cli.report.table import NOTHING, Cell, ReportTable
from sret_cli.runtime.signs import in_one_line
from sret_cli.spec.run import Row

FORMATS = ("markdown", "latex", "html", "json", "csv")
STARTS_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
LAST_OF_T1 = "\u017f"  # end of Latin Extended-A, which the T1 fonts cover
TEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "…": r"\dots{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def markdown(table: ReportTable) -> str:
    """The table in Markdown, with its notes under it."""
    right = [table.is_number(index) for index in range(len(table.columns))]
    lines = [
        [
            f"**{markdown_text(c.full_text)}**" if c.bold else markdown_text(c.full_text)
            for c in line
        ]
        for line in table.lines
    ]
    rows = [
        [markdown_text(heading) for heading in table.headings],
        ["---:" if number else "---" for number in right],
        *lines,
    ]
    text = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    return text + "".join(f"\n{markdown_text(note)}\n" for note in table.notes)


def _markdown_cell(cell: Cell) -> str:
    text = markdown_text(cell.full_text)
    return f"**{text}**" if cell.bold else text


def markdown_text(text: str) -> str:
    """Text for a cell of a Markdown table: one line, without characters that have a meaning."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", in_one_line(text))


def latex(table: ReportTable, label: str = "") -> str:
    """The table as a LaTeX float for booktabs and siunitx, by pandas' Styler.

    Numbers are in `S` columns, which align them at the decimal point; an interval of a single
    value has a column of its own.
    """
    import pandas as pd

    cells: dict[str, list[str]] = {}
    formats = ""
    for index, heading in enumerate(table.headings):
        column = [line[index] for line in table.lines]
        number = table.is_number(index) and all(
            c.text == NOTHING or "±" not in c.text or c.half_width is not None for c in column
        )
        name = tex_text(heading)
        cells[f"{{{name}}}" if number else name] = [_tex_cell(cell, number) for cell in column]
        formats += _number_format(column) if number else "l"
        if any(cell.interval_text for cell in column):
            cells[f"95\\,\\% interval{'{}' * index}"] = [tex_text(c.interval_text) for c in column]
            formats += "l"
    style = pd.DataFrame(cells).style.hide(axis="index")
    text = style.to_latex(
        column_format=formats,
        hrules=True,
        caption=" ".join(tex_text(sentence) for sentence in _caption(table)) or None,
        label=label or None,
        position="htbp",
        position_float="centering",
    )
    lines = text.splitlines()
    look = (r"\small", r"\setlength{\tabcolsep}{4pt}", r"\setlength{\belowcaptionskip}{4pt}")
    start = lines.index(r"\centering") + 1
    lines[start:start] = look
    first = lines.index(r"\midrule") + 1
    for block in reversed(table.blocks):
        lines.insert(first + block, r"\midrule")
    return "\n".join(["% needs \\usepackage{booktabs} and \\usepackage{siunitx}", *lines, ""])


def _caption(table: ReportTable) -> list[str]:
    return sentences((table.title, *table.notes))


def sentences(texts: Sequence[str]) -> list[str]:
    """The texts that are not empty, each with a full stop."""
    return [text if text.endswith(".") else f"{text}." for text in texts if text]


def _tex_cell(cell: Cell, number: bool) -> str:
    if not number:
        text = tex_text(cell.text)
        return f"\\textbf{{{text}}}" if cell.bold else text
    if cell.text == NOTHING:
        return "{--}"
    text = cell.text.replace(",", "").replace("−", "-").replace("±", r"\pm")
    if cell.half_width == 0:  # siunitx prints no uncertainty of 0
        text = f"${text}$"
        return f"{{\\boldmath {text}}}" if cell.bold else f"{{{text}}}"
    return f"\\bfseries {text}" if cell.bold else text


def _number_format(cells: Sequence[Cell]) -> str:
    """The `S` column that has room for all numbers of a column."""
    texts = [cell.text.replace(",", "") for cell in cells if cell.text != NOTHING]
    values = [text.partition(" ± ")[0].lstrip("+-−") for text in texts]
    wholes, parts = zip(*(value.partition(".")[::2] for value in values or ["0"]), strict=True)
    size = f"{max(map(len, wholes))}.{max(map(len, parts))}"
    sign = next((s for text in texts for s in text[:1] if s in "+-−"), "").replace("−", "-")
    widths = [text.partition(" ± ")[2] for text in texts if "±" in text]
    error = max((len(width.replace(".", "").lstrip("0") or "0") for width in widths), default=0)
    uncertainty = f"({error})" if error else ""
    options = f"table-format={sign}{size}{uncertainty}"
    options += ", group-digits=integer" if max(map(len, parts)) > 4 else ""
    options += ", separate-uncertainty=true, table-align-uncertainty=false" if error else ""
    options += ", detect-weight=true" if any(cell.bold for cell in cells) else ""
    options += ", retain-explicit-plus=true" if any(text[0] == "+" for text in texts) else ""
    return f"S[{options}]"


def tex_text(text: str) -> str:
    """Text for LaTeX: one line, without characters that have a meaning or that pdfTeX lacks."""
    signs = (TEX.get(sign, sign if sign <= LAST_OF_T1 else "?") for sign in in_one_line(text))
    return "".join(signs)


def html(table: ReportTable) -> str:
    """The table as an HTML element, by pandas' Styler."""
    import pandas as pd

    frame = pd.DataFrame(table.texts(), columns=_distinct(table.headings))
    style = frame.style.hide(axis="index").format(escape="html")
    style = style.format_index(escape="html", axis="columns")
    caption = " ".join(_caption(table))
    escaped = caption.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = (
        style.set_caption(escaped).set_uuid("sret").to_html(bold_headers=False, exclude_styles=True)
    )
    return text


def _distinct(headings: Sequence[str]) -> list[str]:
    """Headings in which none is there twice, as pandas' Styler needs."""
    return [f"{text}{' ' * headings[:i].count(text)}" for i, text in enumerate(headings)]


def json_text(table: ReportTable) -> str:
    """The records of a table as JSON."""
    return json.dumps(table.records(), indent=2) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """All rows and columns as CSV: unrounded floats, lists as JSON, empty if not measured.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_csv_value(column) for column in columns])
    for row in rows:
        writer.writerow([_csv_value(row.get(column)) for column in columns])
    return text.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    if isinstance(value, str) and value.startswith(STARTS_FORMULA):
        return f"'{value}"
    return value
