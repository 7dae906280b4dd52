"""Processes that died in the middle of a run: how often, and when a run is given up as lost."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.files import read_json, utc_now, write_json
from sret_cli.runtime.lock import LAUNCH, Busy, holder_of, locked_directory
from sret_cli.spec.run import Row, Run
from sret_cli.study.execute import LOST
from sret_cli.study.rows import planned_row, provenance, read_row

DEATHS_FILE = "deaths.json"
LOG_FILE = "worker.log"
LAST_LINES = 5  # of the log, in the reason of a lost run


def cause_of_death(code: int) -> str:
    """What a negative exit code of a process means: "signal 9 (SIGKILL)"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def died_unrecorded(directory: Path) -> bool:
    """Whether a worker of the same launch died at a run, and the launcher has not recorded it yet.

    Nobody goes on with such a run before it is known how often it ended its process.
    """
    holder = holder_of(directory)
    launch = os.environ.get(LAUNCH)
    if not holder or launch is None or holder.get("launch") != launch:
        return False
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or pid == os.getpid() or _is_alive(pid):
        return False
    return not any(death.get("pid") == pid for death in deaths_of(directory))


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, TypeError, ValueError):
        return False
    return True


def record_death(run: Run, directory: Path, pid: int, cause: str, retries: int) -> Row | None:
    """Records that the process of a run died; gives the run up after too many deaths.

    Args:
        run: the run.
        directory: its directory.
        pid: the process.
        cause: what ended it.
        retries: how often a run resumes after a death.

    Returns:
        The row of the run with the status "lost", or None if it may go on.
    """
    deaths = deaths_of(directory)
    deaths.append({"pid": pid, "cause": cause, "host": socket.gethostname(), "at": utc_now()})
    write_json(directory / DEATHS_FILE, deaths)
    if len(deaths) <= retries:
        return None
    try:
        with locked_directory(directory):
            row = read_row(directory) or {**planned_row(run), **provenance()}
            if row["final_loss"] is None:
                last = "; ".join(last_lines(directory / LOG_FILE))
                reason = f"its process was ended by {cause}, {len(deaths)} times in all"
                row |= {"status": LOST, "error": f"{reason}; last lines of {LOG_FILE}: {last}"}
                write_json(directory / "row.json", row)
            return row
    except Busy:  # somebody goes on with it already
        return None


def deaths_of(directory: Path) -> list[dict[str, Any]]:
    """The deaths of processes that did a run, as recorded in its directory."""
    try:
        deaths = read_json(directory / DEATHS_FILE)
    except SretError:
        return []
    return deaths if isinstance(deaths, list) else []


def forget_deaths(directory: Path) -> None:
    """Forgets the deaths of a run that is tried again or done."""
    (directory / DEATHS_FILE).unlink(missing_ok=True)


def last_lines(path: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log, without empty ones; at most 64 KiB are read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - 65_536, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()][-count:]
