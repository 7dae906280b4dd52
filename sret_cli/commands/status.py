"""`sret status`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sret_cli.commands.completion import studies
from sret_cli.commands.flags import WHERE, Json, Runs
from sret_cli.commands.output import Output, print_json, print_table

if TYPE_CHECKING:
    from sret_cli.report.table import ReportTable
    from sret_cli.study.status import RunStatus

WATCH_SECONDS = 2.0  # between two looks
LOOKS_PER_SQUEUE = 5  # because squeue is work for the scheduler
SHOWN_WAITING = 3  # runs that wait, of which the others are counted


def status(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDY | DIR]",
            help="A study file or a directory of runs; all runs if not given.",
            autocompletion=studies,
        ),
    ] = None,
    *,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Show it again every two seconds, until all runs have ended.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Show which runs are done, running, waiting, failed or lost, from their directories."""
    from sret_cli.study.slurm_queue import queue_lines
    from sret_cli.study.status import status_directory, study_status

    directory = status_directory(path, runs)
    found = study_status(path, runs)
    if json_:
        return print_json([status.record() for status in found])
    queue = queue_lines(directory)
    print_status(found, queue)
    looks = 0
    while watch and any(status.state in ("running", "waiting") for status in found):
        time.sleep(WATCH_SECONDS)
        looks += 1
        found = study_status(path, runs)
        if looks % LOOKS_PER_SQUEUE == 0:
            queue = queue_lines(directory)
        output = Output()
        if output.is_terminal:
            output.clear()
        print_status(found, queue)


def print_status(found: Sequence["RunStatus"], queue: Sequence[str]) -> None:
    """Prints how many runs are in each state, a table of those not done, and jobs of Slurm."""
    from sret_cli.study.status import count_states

    counts = [f"{count} {state}" for state, count in count_states(found).items()]
    Output().print(f"{len(found)} runs: {', '.join(counts) or 'none'}")
    if any(status.state != "done" for status in found):
        print_table(status_table(found))
    for line in queue:
        Output().print(line)


def status_table(found: Sequence["RunStatus"]) -> "ReportTable":
    """The runs that are not done: first those under way, then failed and lost, then the others."""
    from sret_cli.report.table import text_table

    order = ("running", "failed", "lost", "waiting")
    lines = []
    for state in order:
        members = [status for status in found if status.state == state]
        hidden = len(members) - SHOWN_WAITING if state == "waiting" else 0
        for status in members[:SHOWN_WAITING] if state == "waiting" else members:
            lines.append([status.label, state, *_progress(status)])
        if hidden > 0:
            lines.append([f"and {hidden} more", state, "–", "–", "–"])
    return text_table(["Run", "State", "Progress", "Left", "Where"], lines)


def _progress(status: "RunStatus") -> list[str]:
    """Progress or reason, time left, and process of a run."""
    live, row = status.live or {}, status.row or {}
    where = f"process {live['pid']} on {live['host']}" if {"pid", "host"} <= live.keys() else "–"
    if status.state == "running":
        step = (
            f"step {live['step']:,} of {live['steps']:,}, {live['text']}" if "step" in live else "–"
        )
        return [step, str(live.get("left", "–")), where]
    if status.state in ("failed", "lost"):
        return [str(row.get("error")), "–", "–"]
    step = f"stopped at step {live['step']:,} of {live['steps']:,}" if "step" in live else "–"
    return [step, "–", "–"]
