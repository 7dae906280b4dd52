"""Where output goes: tables and JSON to stdout, notes to stderr."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.processes import is_leader
from sret_cli.runtime.signs import fit_to_encoding


def stderr_console() -> Console:
    """Where progress and notes go: stderr, of the first of several processes."""
    return Console(
        stderr=True,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        quiet=not is_leader(),
    )


LEAST_WIDTH = 20  # of tables: rich leaves the numbers out where there is no room for the frame


class PipeClosed(Exception):
    """The reader of our output, such as head, has had enough."""


class Output(Console):
    """Where tables go, results to stdout: wide where it is no terminal."""

    def __init__(self, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        columns = os.environ.get("COLUMNS", "")
        known = terminal and not columns or columns.isdecimal() and int(columns) > 0
        super().__init__(
            width=None if known else 200, highlight=False, markup=False, emoji=False, stderr=stderr
        )
        self.width = max(self.width, LEAST_WIDTH)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text in signs that the terminal has, so that columns are as wide as they look."""
        return super().render_str(fit_to_encoding(text, self.encoding), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints what a terminal that is too narrow breaks into lines; nothing is cut off."""
        super().print(*objects, **{"crop": False, **options})

    def on_broken_pipe(self) -> None:
        """Lets `main` end quietly, where rich would exit with 1."""
        raise PipeClosed


def print_json(value: Any) -> None:
    """The one JSON document on stdout."""
    try:
        print(json.dumps(value, indent=2), flush=True)
    except BrokenPipeError:
        raise PipeClosed from None


def run_or_newest(directory: Path | None, runs: Path) -> Path:
    """The directory that a user named, or that of the newest run, which is then said on stderr.

    While a study trains, the newest run is soon another one.
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
    """Prints rows as a table, or whole as JSON."""
    from sret_cli.report.tables import table_cells, terminal_table

    if as_json:
        return print_json(rows)
    Output().print(terminal_table(*table_cells(rows, columns)))


def exit_if_failed(failed: list[Any]) -> None:
    """Ends with the exit code that failed runs call for.

    Raises:
        SretError: some runs failed; one run alone fails with its own reason and code.
    """
    if not failed:
        return
    (run, error), count = failed[0], len(failed)
    if count == 1:
        raise SretError(f"run {run.run_id} failed: {error}", error.code)
    code = max(error.code for _, error in failed)
    raise SretError(f"{count} runs failed, the first, {run.run_id}: {error}", code)
