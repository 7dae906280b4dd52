"""`sret study check` and `sret study schema`."""

from pathlib import Path
from typing import Annotated

import typer

from sret_cli.commands.completion import studies
from sret_cli.commands.flags import Json
from sret_cli.commands.output import Output, print_json
from sret_cli.runtime.errors import SPEC, SretError

study_app = typer.Typer(
    name="study", help="Check a study file, or print its schema.", rich_markup_mode=None
)


@study_app.callback()
def study_root() -> None:
    """Check a study file, or print its schema."""


@study_app.command()
def check(
    path: Annotated[
        Path,
        typer.Argument(metavar="STUDY", help="Study file (TOML).", autocompletion=studies),
    ],
    *,
    json_: Json = False,
) -> None:
    """Check all runs of a study file, and say at which lines its mistakes are."""
    from sret_cli.study.check import find_problems

    problems, runs = find_problems(path)
    if json_:
        print_json([{"line": problem.line, "message": problem.message} for problem in problems])
    for problem in () if json_ else problems:
        place = f"{path}:{problem.line}" if problem.line else str(path)
        Output().print(f"{place}: {problem.message}", soft_wrap=True)
    if problems:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise SretError(f"{path} has {count}", SPEC)
    if not json_:
        Output().print(f"{path}: {runs} runs, no mistakes", soft_wrap=True)


@study_app.command()
def schema() -> None:
    """Print the JSON Schema of study files, by which editors complete and check them."""
    from sret_cli.study.schema import study_schema

    print_json(study_schema())
