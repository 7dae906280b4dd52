"""The `sret` program: its commands, and how errors become messages and exit codes."""

import errno
import os
import signal
import sys
import traceback
from itertools import zip_longest
from typing import Annotated, NoReturn

import typer

from sret_cli import __version__
from sret_cli.commands.build import build
from sret_cli.commands.clean import clean
from sret_cli.commands.command import Command
from sret_cli.commands.convert import convert
from sret_cli.commands.data import data_app
from sret_cli.commands.evaluate import evaluate
from sret_cli.commands.export import export
from sret_cli.commands.help import help_command
from sret_cli.commands.labels import distill_labels
from sret_cli.commands.output import Output, PipeClosed
from sret_cli.commands.profile import profile
from sret_cli.commands.report import report_command
from sret_cli.commands.status import status
from sret_cli.commands.study import study_app
from sret_cli.commands.train import run, train
from sret_cli.runtime.errors import RESOURCES, USAGE, SretError, as_loader_lost, as_out_of_memory
from sret_cli.runtime.signals import EXIT_CODES
from sret_cli.runtime.signs import prepare_streams
from sret_cli.training.rank_error import wait_until_reported

app = typer.Typer(
    name="sret",
    help="Scaling studies of deep vision transformers with shared weights.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Scaling studies of deep vision transformers with shared weights."""
    if version:
        print(f"sret {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


app.command()(build)
app.command()(profile)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(convert)
app.command(name="report")(report_command)
app.command()(run)
app.command()(status)
app.command()(clean)
app.command()(export)
app.command()(distill_labels)
app.command(name="help")(help_command)
app.add_typer(data_app)
app.add_typer(study_app)
for info in (
    *app.registered_commands,
    *data_app.registered_commands,
    *study_app.registered_commands,
):
    info.cls = Command


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs `sret` and exits with the code of the outcome."""
    prepare_streams()
    arguments = expand_bare_compile(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    for number in EXIT_CODES.keys() - {signal.SIGINT}:
        signal.signal(number, _terminated)
    try:
        rest = [argument for argument in arguments if argument != "--debug"]
        code = app(args=rest, prog_name="sret", standalone_mode=False)
        sys.stdout.flush()
    except SretError as error:
        _print_table(error)
        code = _fail(error, str(error), error.code, debug)
    except typer.TyperException as error:
        code = _fail(error, error.format_message(), USAGE, debug)
    except (typer.Abort, KeyboardInterrupt) as error:
        code = _fail(error, "interrupted; results finished so far are kept", 130, debug)
    except (RuntimeError, MemoryError) as error:
        found = as_out_of_memory(error) or as_loader_lost(error)
        if found is None:
            raise
        code = _fail(found, str(found), found.code, debug)
    except (PipeClosed, BrokenPipeError):
        _drop_stdout()
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_stdout()
        code = _fail(error, "no room left on the disk for the output; free some", RESOURCES, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _drop_stdout() -> None:
    """Drops what is left to write, so that Python does not fail at it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def expand_bare_compile(arguments: list[str]) -> list[str]:
    """The arguments with "on" after each `--compile` that has no value."""
    spelt = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        spelt.append(argument)
        if argument == "--compile" and (following[:1] in ("", "-") or following.endswith(".toml")):
            spelt.append("on")
    return spelt


def _print_table(error: SretError) -> None:
    """Prints the table of an error on stderr, if it has one."""
    if error.table:
        from sret_cli.report.tables import terminal_table

        headings, *lines = map(list, error.table)
        Output(stderr=True).print(terminal_table(headings, lines))


def _terminated(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(EXIT_CODES[signal.Signals(signal_number)])


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if wait_until_reported(error):
        print(f"sret: {message}", file=sys.stderr)
    return code
