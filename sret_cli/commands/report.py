"""`sret report`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.completion import studies
from sret_cli.commands.flags import Json, ReportOut, Runs
from sret_cli.commands.output import print_rows, stderr_console
from sret_cli.runtime.errors import DATA, SretError


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
    out: ReportOut = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Print a table of what runs measured, and write it as Markdown and CSV with figures."""
    from sret_cli.study.file import ReportSpec, load_report

    spec, where = ReportSpec(), path or runs
    if path is not None and path.suffix == ".toml" and not path.is_dir():
        spec, where = load_report(path), runs / path.stem
    write_report(where, spec, out or where / "report", json_)


def write_report(where: Path, spec: Any, out: Path, as_json: bool) -> None:
    """Prints the rows in a directory and writes their report.

    Raises:
        SretError: the directory has no finished runs.
    """
    from sret_cli.report import write
    from sret_cli.report.curves import write_training_figure
    from sret_cli.report.tables import RUN_TABLE
    from sret_cli.study.rows import read_rows

    rows = read_rows(where)
    if not rows:
        raise SretError(
            f"no finished runs in {where}; `sret train` or `sret run STUDY` makes some", DATA
        )
    files = write.write_report(rows, spec, out)
    files += write_training_figure(where, out)
    print_rows(rows, RUN_TABLE, as_json)
    stderr_console().print(f"wrote {', '.join(file.name for file in files)} to {out}")
