"""The report as one page: `report.html`, a single file that needs no network.

Its scripts are allowed by their hash alone, so that no text of a run can become a script, and the
page may load nothing.
"""

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sret_cli import __version__
from sret_cli.report.page_figures import Point, has_color_map, inline_svg
from sret_cli.report.page_runs import RunDetails, describe_runs, run_index
from sret_cli.report.page_tables import PageTable, TableView, table_view
from sret_cli.runtime.files import write_atomically
from sret_cli.spec.run import Row


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        title: its heading.
        caption: what it shows.
        svg: text that Matplotlib wrote; a link to `#run-` and a run's id leads to that run.
    """

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class PageRun:
    """A run of the page.

    Attributes:
        row: its row; `error` says why it failed.
        config: its `config.json`; None if there is none.
        metrics: the lines of its `metrics.jsonl`.
    """

    row: Row
    config: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PageContent:
    """All that the page shows.

    Attributes:
        title: the study's name.
        question: the comment that heads its file; blank lines part paragraphs, and lines that start
            with two spaces are commands.
        answers: the answer in numbers, a sentence each.
        figures: figures, in their order.
        tables: tables, in their order; the table of all runs is added.
        runs: runs with a row, failed ones too.
        missing: labels of runs without a row.
        notes: what the reader has to know about the numbers.
    """

    title: str
    question: str
    answers: Sequence[str]
    figures: Sequence[PageFigure]
    tables: Sequence[PageTable]
    runs: Sequence[PageRun]
    missing: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _FigureView:
    figure: PageFigure
    anchor: str
    svg: Markup
    is_light: bool
    has_points: bool


def write_page(content: PageContent, path: Path) -> None:
    """Writes the page atomically.

    Raises:
        SretError: the directory cannot be written to, or the disk is full.
    """
    write_atomically(path, page_html(content))


def page_html(content: PageContent) -> str:
    """The page as HTML. Equal content gives equal text."""
    runs, common = describe_runs([(run.row, run.config, run.metrics) for run in content.runs])
    anchors = {run.run_id: run.anchor for run in reversed(runs)}
    script = _template_text("page.js")
    return (
        _environment()
        .get_template("page.html")
        .render(
            content=content,
            question=_blocks(content.question),
            summary=_summary(content),
            figures=_figures(content.figures, runs, content.runs),
            tables=[
                table_view(table, f"table-{number}", anchors)
                for number, table in enumerate(content.tables, 1)
            ],
            index=_index(content.runs, runs, anchors),
            runs=runs,
            failed=[run for run in runs if run.error],
            common=common,
            style=Markup(_template_text("page.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            datatables=_datatables(),
            version=__version__,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("sret_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template_text(name: str) -> str:
    return (files("sret_cli.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _datatables() -> str:
    """The bundle of DataTables that itables has, compressed, in base64."""
    from itables import options

    bundle = Path(options.dt_bundle).read_bytes()
    return base64.b64encode(gzip.compress(bundle, mtime=0)).decode()


def _figures(
    figures: Sequence[PageFigure], details: Sequence[RunDetails], runs: Sequence[PageRun]
) -> list[_FigureView]:
    points = {
        f"#run-{run.row.get('run_id')}": Point(f"#{found.anchor}", found.tip)
        for run, found in reversed(list(zip(runs, details, strict=True)))
    }
    views = []
    for number, figure in enumerate(figures, 1):
        anchor = f"figure-{number}"
        svg = inline_svg(figure.svg, f"f{number}-", f"{anchor}-title", points)
        has_points = 'class="point"' in svg
        is_light = has_color_map(figure.svg)
        views.append(_FigureView(figure, anchor, Markup(svg), is_light, has_points))
    return views


def _index(
    runs: Sequence[PageRun], details: Sequence[RunDetails], anchors: Mapping[str, str]
) -> TableView | None:
    if not runs:
        return None
    headings, lines, values = run_index([run.row for run in runs], details)
    table = PageTable("All runs", headings, lines, sort_values=values)
    return table_view(table, "all-runs", anchors, [run.anchor for run in details])


def _summary(content: PageContent) -> str:
    """How many runs there are, and what became of them."""
    failed = sum(bool(run.row.get("error")) for run in content.runs)
    done = len(content.runs) - failed
    total = len(content.runs) + len(content.missing)
    parts = [f"{done:,} finished"]
    parts += [f"{failed:,} failed"] * bool(failed)
    parts += [f"{len(content.missing):,} missing"] * bool(content.missing)
    return f"{total:,} {'run' if total == 1 else 'runs'}: {', '.join(parts)}"


def _blocks(text: str) -> list[tuple[str, str]]:
    """Paragraphs and commands of a comment, in their order: ("text" or "command", text)."""
    blocks: list[tuple[str, list[str]]] = []
    open_kind = None
    for line in text.splitlines():
        if not line.strip():
            open_kind = None
            continue
        kind = "command" if line.startswith("  ") else "text"
        if kind != open_kind:
            blocks.append((kind, []))
        blocks[-1][1].append(line.strip())
        open_kind = kind
    return [(kind, ("\n" if kind == "command" else " ").join(lines)) for kind, lines in blocks]
