"""A report as files: tables, figures, and one page with all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sret_cli.report.answers import answers
from sret_cli.report.changes import changes_table
from sret_cli.report.collect import Collection
from sret_cli.report.comparisons import compare, comparison_table
from sret_cli.report.formats import csv_text, json_text, latex, markdown, sentences
from sret_cli.report.metrics import read_metrics
from sret_cli.report.summary import summarise
from sret_cli.report.table import ReportTable
from sret_cli.runtime.errors import SretError
from sret_cli.runtime.files import make_directory, read_json, write_atomically
from sret_cli.spec.run import Row


@dataclass(frozen=True)
class Report:
    """The tables of a report by the stems of their files, and its sentences."""

    collection: Collection
    tables: dict[str, ReportTable]
    answers: Sequence[str]

    @property
    def rows(self) -> list[Row]:
        """The rows that the report shows."""
        return list(self.collection.rows.values())


def make_report(collection: Collection) -> Report:
    """The tables of a collection: of all settings, of pairs, and of runs that two sources share."""
    rows, spec = list(collection.rows.values()), collection.spec
    tables = {"table": summarise(rows, spec, title=collection.title)}
    comparisons = compare(rows)
    if comparisons:
        tables["comparisons"] = comparison_table(comparisons)
    if len(collection.sources) == 2:
        kept = [
            [row for place, row in source.rows.items() if place in collection.rows]
            for source in collection.sources
        ]
        labels = collection.sources[0].label, collection.sources[1].label
        changes = changes_table(kept[0], kept[1], labels)
        tables |= {"changes": changes} if changes else {}
    return Report(collection, tables, answers(rows, comparisons, len(collection.missing)))


def write_report(report: Report, directory: Path) -> list[Path]:
    """Writes tables, figures and the page of a report; returns the files.

    `table.csv` has all rows and columns, unrounded.
    """
    from sret_cli.report.curves import write_training_figure
    from sret_cli.report.figures import draw_figures, write_figure
    from sret_cli.report.page import PageContent, PageFigure, PageRun, PageTable, write_page

    make_directory(directory)
    files = [directory / "table.csv"]
    write_atomically(files[0], csv_text(report.rows))
    for stem, table in report.tables.items():
        label = f"tab:{stem}" if stem != "table" else "tab:results"
        texts = {"md": markdown(table), "tex": latex(table, label), "json": json_text(table)}
        for suffix, text in texts.items():
            files.append(directory / f"{stem}.{suffix}")
            write_atomically(files[-1], text)
    collection = report.collection
    metrics = {row["run_id"]: read_metrics(place) for place, row in collection.rows.items()}
    pictures = []
    for drawn in draw_figures(report.rows, collection.spec, metrics, links=True):
        written, svg = write_figure(drawn.figure, directory / drawn.name)
        files += written
        pictures.append(PageFigure(drawn.title, drawn.caption, svg))
    if len(collection.rows) == 1:
        files += write_training_figure(next(iter(collection.rows)), directory)
    content = PageContent(
        title=collection.title,
        question=collection.question,
        answers=report.answers,
        figures=pictures,
        tables=[
            PageTable(
                title=table.title,
                headings=table.headings,
                lines=table.texts(),
                note=" ".join(sentences(table.notes)),
                sort_values=[[_sort_value(cell.value) for cell in line] for line in table.lines],
            )
            for table in report.tables.values()
        ],
        runs=[
            PageRun(row, _config(place), metrics[row["run_id"]])
            for place, row in collection.rows.items()
        ],
        missing=collection.missing,
        notes=collection.notes,
    )
    files.append(directory / "report.html")
    write_page(content, files[-1])
    return files


def _sort_value(value: Any) -> float | str | None:
    if isinstance(value, tuple):
        return float(value[0]) if value and isinstance(value[0], int | float) else str(value)
    return value


def _config(directory: Path) -> dict[str, Any] | None:
    """The config of a run, or None if it cannot be read."""
    try:
        config = read_json(directory / "config.json")
    except SretError:
        return None
    return config if isinstance(config, dict) else None
