"""Where output goes: tables and JSON to stdout, notes to stderr."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.runtime.processes import is_leader
from sret_cli.runtime.signs import fit_to_encoding

if TYPE_CHECKING:
    from sret_cli.report.table import ReportTable

LEAST_WIDTH = 20  # of tables: in less room for the frame, rich leaves the numbers out
WIDTH_OF_FILES = 200  # of tables that do not go to a terminal


def stderr_console() -> Console:
    """A console for progress and notes; in distributed runs only rank 0 prints."""
    return Console(
        stderr=True,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        quiet=not is_leader(),
    )


class PipeClosed(Exception):
    """The program that reads our output, such as head, has closed it."""


class Output(Console):
    """A console for tables and results: wide if it is not a terminal."""

    def __init__(self, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        columns = os.environ.get("COLUMNS", "")
        known = terminal and not columns or columns.isdecimal() and int(columns) > 0
        super().__init__(
            width=None if known else WIDTH_OF_FILES,
            highlight=False,
            markup=False,
            emoji=False,
            stderr=stderr,
        )
        self.width = max(self.width, LEAST_WIDTH)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, with characters that the terminal lacks replaced before widths are computed."""
        return super().render_str(fit_to_encoding(text, self.encoding), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints without cropping: text that is too wide for the terminal is wrapped."""
        super().print(*objects, **{"crop": False, **options})

    def on_broken_pipe(self) -> None:
        """Raises `PipeClosed`, so that `main` ends quietly; rich would exit with 1."""
        raise PipeClosed


def print_json(value: Any) -> None:
    """Prints the one JSON document of a command on stdout."""
    try:
        print(json.dumps(value, indent=2), flush=True)
    except BrokenPipeError:
        raise PipeClosed from None


def run_or_newest(directory: Path | None, runs: Path) -> Path:
    """The directory that a user named, or else that of the newest run, named in a note.

    The note is needed because another run may soon be the newest.
    """
    from sret_cli.study.rows import newest_run, read_row

    if directory is not None:
        return directory
    directory = newest_run(runs)
    row = read_row(directory) or {}
    stderr_console().print(
        f"took the newest run, {directory} ({row['name']}, of {row['started_at']})"
    )
    return directory


def print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    """Prints some columns of rows as a table, or all columns as JSON."""
    from sret_cli.report.summary import summarise

    if as_json:
        return print_json(rows)
    print_table(summarise(rows, columns=columns))


def print_table(table: "ReportTable") -> None:
    """Prints a table on stdout, as wide as the terminal."""
    from sret_cli.report.terminal import fitted_table

    output = Output()
    output.print(fitted_table(table, output.width))


def check_csv_path(path: Path, header: str) -> None:
    """Raises if a CSV cannot be written; a file is only replaced if it has the same header.

    Raises:
        SretError: the path is not a `.csv`, its directory cannot be written to, or it is another
            file.
    """
    from sret_cli.runtime.files import make_directory

    if path.suffix != ".csv":
        raise SretError(f"--out {path}: name a file that ends in .csv", USAGE)
    make_directory(path.parent)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline(10_000).rstrip("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise SretError(
            f"cannot read {path}: {error.strerror}; choose another --out", USAGE
        ) from None
    if first != header:
        raise SretError(f"{path} is another file; choose another --out", USAGE)


def exit_if_failed(failed: list[Any]) -> None:
    """Raises if runs failed, with the exit code of the failure.

    Raises:
        SretError: some runs failed; a single one gives its own reason and code.
    """
    if not failed:
        return
    (run, error), count = failed[0], len(failed)
    if count == 1:
        raise SretError(f"run {run.run_id} failed: {error}", error.code)
    code = max(error.code for _, error in failed)
    raise SretError(f"{count} runs failed, the first, {run.run_id}: {error}", code)
