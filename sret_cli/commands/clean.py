"""`sret clean`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sret_cli.commands.completion import studies
from sret_cli.commands.flags import WHERE, Json, Runs
from sret_cli.commands.output import print_json, stderr_console
from sret_cli.runtime.errors import USAGE, SretError


def clean(
    study: Annotated[
        Path | None,
        typer.Argument(
            metavar="STUDY | RUN | DIR",
            help="A study file, a run, or a directory of runs; all runs if not given.",
            autocompletion=studies,
        ),
    ] = None,
    *,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove without asking.", rich_help_panel=WHERE)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List, and remove nothing.", rich_help_panel=WHERE),
    ] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Remove the checkpoints of finished runs: of a study, or of all under runs/.

    Prints how many bytes they take, and asks before removing them. Weights, rows and metrics stay.
    So do the checkpoints of runs that are not finished, or that another run will continue from.
    Without its checkpoints a run cannot be given more epochs by --resume.
    """
    from sret_cli.study.clean import find_checkpoints, remove_checkpoints

    found = find_checkpoints(runs_directory(study, runs))
    free = [checkpoints for checkpoints in found if checkpoints.needed is None]
    listed, size = [c.summary() for c in free], sum(c.size_bytes for c in free)
    stay = [c.summary() for c in found if c.needed is not None]
    if not json_:
        for item in listed:
            print(f"{item['run']}: {item['bytes']:,} bytes of checkpoints")
        for item in stay:
            stderr_console().print(f"{item['run']}: its checkpoints stay: {item['needed']}")
    many = "1 finished run" if len(free) == 1 else f"{len(free):,} finished runs"
    total = f"{size:,} bytes of checkpoints of {many}"
    removed = 0
    if free and not dry_run and is_confirmed(yes, total):
        removed = remove_checkpoints(free)
    if json_:
        return print_json({"runs": listed, "bytes": size, "needed": stay, "removed_bytes": removed})
    if not free:
        print("no checkpoints of finished runs")
    elif dry_run:
        print(f"would remove {total}")
    else:
        print(f"removed {removed:,} bytes" if removed else "nothing was removed")


def is_confirmed(yes: bool, total: str) -> bool:
    """Whether the user agrees to remove checkpoints, by `--yes` or when asked.

    Raises:
        SretError: there is no `--yes`, and no terminal to ask on.
    """
    if not yes and not sys.stdin.isatty():
        raise SretError(f"nothing was removed; --yes removes {total}", USAGE)
    return yes or typer.confirm(f"remove {total}?", err=True)


def runs_directory(study: Path | None, runs: Path) -> Path:
    """The directory that the argument names; the runs of a study file are under its name."""
    if study is None or study.is_dir():
        return study or runs
    return runs / (study.stem if study.suffix == ".toml" else study)
