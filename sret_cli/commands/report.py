"""`sret report`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.completion import studies
from sret_cli.commands.flags import WHERE, Json, ReportOut, Runs
from sret_cli.commands.output import Output, print_rows, stderr_console
from sret_cli.runtime.errors import DATA, SretError

SHOWN = 5  # missing runs that are named


def report_command(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="STUDY | RUN | DIR",
            help="A study file, a run, or a directory of runs; all runs if not given.",
            autocompletion=studies,
        ),
    ] = None,
    *,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also show runs of the study that its file no longer has.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    out: ReportOut = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Print a table of what runs measured, and write it as Markdown and CSV with figures."""
    from sret_cli.study.file import load_report
    from sret_cli.study.rows import read_rows
    from sret_cli.study.view import ReportSpec

    if path is not None and path.suffix == ".toml" and not path.is_dir():
        where = runs / path.stem
        rows = rows_of_study(path, where, every)
        return write_report(where, rows, load_report(path), out or where / "report", json_)
    where = path or runs
    write_report(where, read_rows(where), ReportSpec(), out or where / "report", json_)


def rows_of_study(path: Path, where: Path, every: bool) -> list[Any]:
    """The rows in a directory that belong to a study file; notes runs without rows, and others."""
    from sret_cli.study.plan import match_rows
    from sret_cli.study.rows import read_rows

    plan = match_rows(path, read_rows(where))
    console = stderr_console()
    if plan.missing:
        count = len(plan.missing) + len(plan.rows)
        shown = "; ".join(plan.missing[:SHOWN]) + "; …" * (len(plan.missing) > SHOWN)
        console.print(f"{len(plan.rows)} of {count} runs; missing: {shown}")
    if plan.others and not every:
        console.print(f"{len(plan.others)} other runs are in {where}; --all shows them")
    return [*plan.rows, *(plan.others if every else ())]


def write_report(where: Path, rows: list[Any], spec: Any, out: Path, as_json: bool) -> None:
    """Prints the table of rows and writes their report.

    Raises:
        SretError: there are no rows.
    """
    from sret_cli.report import write
    from sret_cli.report.comparisons import COMPARISON_NOTE, compare, comparison_cells
    from sret_cli.report.curves import write_training_figure
    from sret_cli.report.tables import RUN_TABLE, terminal_table

    if not rows:
        raise SretError(
            f"no finished runs in {where}; `sret train` or `sret run STUDY` makes some", DATA
        )
    files = write.write_report(rows, spec, out)
    files += write_training_figure(where, out)
    print_rows(rows, RUN_TABLE, as_json)
    if not as_json and (comparisons := compare(rows)):
        cells = comparison_cells(comparisons)
        title = "Shared models against their controls"
        Output().print(terminal_table(*cells, title=title, note=COMPARISON_NOTE.split(" Bold")[0]))
    stderr_console().print(f"wrote {', '.join(file.name for file in files)} to {out}")
