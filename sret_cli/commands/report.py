"""`sret report`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sret_cli.commands.completion import choices, columns, conditions, studies
from sret_cli.commands.flags import REPORT, WHERE, Json, ReportOut, Runs
from sret_cli.commands.output import print_json, print_table, stderr_console
from sret_cli.runtime.errors import USAGE, SretError, nearest_choice

if TYPE_CHECKING:
    from sret_cli.report.collect import Collection
    from sret_cli.study.file import Study

WATCH_SECONDS = 5.0  # between two looks at the runs


def report_command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[STUDY | RUN | DIR]...",
            help="Study files, runs, or directories of runs; all runs if not given. Two are "
            "compared.",
            autocompletion=studies,
        ),
    ] = None,
    *,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="<condition>",
            help="Show these runs only: 'slices == 4 and layers >= 8'.",
            autocompletion=conditions,
            rich_help_panel=REPORT,
        ),
    ] = None,
    columns_: Annotated[
        list[str] | None,
        typer.Option(
            "--columns",
            metavar="<names>",
            help="Columns of the tables: top1_percent,test_loss.",
            autocompletion=columns,
            rich_help_panel=REPORT,
        ),
    ] = None,
    sort: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<names>",
            help="Columns that order the tables; -top1_percent: largest first.",
            autocompletion=columns,
            rich_help_panel=REPORT,
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<names>",
            help="Fields that tell the series of figures apart: role,slices.",
            autocompletion=columns,
            rich_help_panel=REPORT,
        ),
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(
            "--x",
            help="Column along the x axis of figures.",
            autocompletion=columns,
            rich_help_panel=REPORT,
        ),
    ] = None,
    y: Annotated[
        list[str] | None,
        typer.Option(
            "--y",
            metavar="<names>",
            help="Columns along the y axes, one figure each.",
            autocompletion=columns,
            rich_help_panel=REPORT,
        ),
    ] = None,
    figures: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<kinds>",
            help="Figures to draw: pareto,sharing; those that the runs allow if not given.",
            rich_help_panel=REPORT,
        ),
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(
            help="Behind ± and bands: ci95, sd, sem or none.",
            autocompletion=choices("ci95", "sd", "sem", "none"),
            rich_help_panel=REPORT,
        ),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(
            help="Width of figures: column (3.25 inch) or page (6.75 inch).",
            autocompletion=choices("column", "page"),
            rich_help_panel=REPORT,
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Show published models behind one's own.",
            rich_help_panel=REPORT,
        ),
    ] = False,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Print the table as markdown, latex, html, json or csv.",
            autocompletion=choices("markdown", "latex", "html", "json", "csv"),
            rich_help_panel=REPORT,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also show runs of the study that its file no longer has.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Report again whenever a run ends, until all have or you press Ctrl-C.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    out: ReportOut = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Print a table of what runs measured, and write tables, figures and a page."""
    from sret_cli.report.collect import collect
    from sret_cli.report.formats import FORMATS

    if format_ is not None and format_ not in FORMATS:
        raise SretError(
            f"--format {format_}: no such format; {nearest_choice(format_, list(FORMATS))}", USAGE
        )
    if json_ and (format_ is not None or watch):
        raise SretError("--json cannot be combined with --format or --watch", USAGE)
    values = report_values(
        where=where,
        columns=columns_,
        sort=sort,
        group=group,
        x=x,
        y=y,
        figures=figures,
        interval=interval,
        width=width,
        published=published or None,
    )
    directory = out or report_directory(paths or [], runs)

    def read() -> "Collection":
        return collect(paths or [], runs, every, values, note_damaged)

    if watch:
        return watch_report(read, directory)
    show_report(read(), directory, json_, format_)


def report_values(**flags: Any) -> dict[str, Any]:
    """The keys of `[report]` that flags give; lists may be written with commas.

    Raises:
        SretError: a kind of figure does not exist.
    """
    from sret_cli.study.view import KINDS, FigureSpec

    values = {key: value for key, value in flags.items() if value is not None and value != []}
    for key in ("columns", "sort", "group", "y", "figures"):
        if key in values:
            names = ",".join(values[key]).split(",")
            values[key] = tuple(name.strip() for name in names if name.strip())
    for kind in values.get("figures", ()):
        if kind not in KINDS:
            raise SretError(f"--figures {kind}: {nearest_choice(kind, list(KINDS))}", USAGE)
    if "figures" in values:
        values["figures"] = tuple(FigureSpec(kind=kind) for kind in values["figures"])
    return values


def report_directory(paths: list[Path], runs: Path) -> Path:
    """Where a report is written if no directory is given: next to the rows."""
    if len(paths) != 1:
        return runs / "report"
    (path,) = paths
    is_study = path.suffix == ".toml" and not path.is_dir()
    return (runs / path.stem if is_study else path) / "report"


def note_damaged(error: SretError) -> None:
    """Says on stderr that a row was left out."""
    stderr_console().print(f"left out: {error}")


def show_report(
    collection: "Collection", directory: Path, as_json: bool = False, format_: str | None = None
) -> None:
    """Prints the tables of rows, and writes their report."""
    from sret_cli.report import formats
    from sret_cli.report.write import make_report, write_report

    report = make_report(collection)
    for note in collection.notes:
        stderr_console().print(note)
    files = write_report(report, directory)
    table = report.tables["table"]
    if as_json:
        print_json(report.rows)
    elif format_ == "csv":
        print(formats.csv_text(report.rows), end="")
    elif format_ is not None:
        write = {
            "markdown": formats.markdown,
            "latex": formats.latex,
            "html": formats.html,
            "json": formats.json_text,
        }[format_]
        print(write(table), end="")
    else:
        for shown in report.tables.values():
            print_table(shown)
    page = files[-1]
    stderr_console().print(f"wrote {len(files)} files to {directory}; open {page.name} there")


def watch_report(read: Callable[[], "Collection"], directory: Path) -> None:
    """Reports again whenever rows change, until no run is missing or the user interrupts."""
    shown: list[Any] | None = None
    while True:
        try:
            collection = read()
        except SretError as error:
            if shown is not None:
                raise
            stderr_console().print(f"waiting: {error}")
        else:
            rows = list(collection.rows.values())
            if rows != shown:
                shown = rows
                show_report(collection, directory)
            has_file = any(source.question or source.missing for source in collection.sources)
            if has_file and not collection.missing:
                return
        time.sleep(WATCH_SECONDS)


def report_study(
    study: "Study", rows: list[Any], runs: Path, out: Path | None, as_json: bool
) -> None:
    """Reports the rows that a command has just made.

    Args:
        study: the study that has them.
        rows: what its runs measured.
        runs: the directory of all runs.
        out: where to write the report; next to the rows if None.
        as_json: whether to print JSON.
    """
    from sret_cli.report.collect import Collection, Source

    where = runs / study.name
    places = {where / str(row["run_id"]): row for row in rows}
    collection = Collection(
        title=study.name,
        question=study.question,
        rows=places,
        spec=study.report,
        missing=(),
        notes=(),
        sources=(Source(study.name, places),),
    )
    show_report(collection, out or where / "report", as_json)
