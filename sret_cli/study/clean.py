"""Removes the checkpoints of finished runs and nothing else."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import DATA, SretError
from sret_cli.runtime.files import read_json
from sret_cli.runtime.lock import Busy, locked_directory
from sret_cli.spec.run import CONFIG_FILE
from sret_cli.study.rows import read_row

CHECKPOINTS = "checkpoint-*"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, and the reason if they have to be kept."""

    run: Path
    folders: tuple[Path, ...]
    needed: str | None

    @property
    def size_bytes(self) -> int:
        """Their size on disk."""
        files = (file for folder in self.folders for file in folder.rglob("*"))
        return sum(file.stat().st_size for file in files if file.is_file())

    def summary(self) -> dict[str, Any]:
        """Their place, number and size, as plain values."""
        found = {"run": str(self.run), "checkpoints": len(self.folders), "bytes": self.size_bytes}
        return found if self.needed is None else {**found, "needed": self.needed}


def find_checkpoints(path: Path) -> list[Checkpoints]:
    """The checkpoints of a run, of the runs of a study, or of all runs under a directory.

    Raises:
        SretError: the directory does not exist.
    """
    if not path.is_dir():
        raise SretError(
            f"no directory {path}; name a study, a run, or the directory of all runs", DATA
        )
    found = {
        folder.parent
        for depth in ("", "*/", "*/*/")
        for folder in path.glob(f"{depth}{CHECKPOINTS}")
    }
    return [_checkpoints(run) for run in sorted(found)]


def remove_checkpoints(found: list[Checkpoints]) -> int:
    """Removes checkpoints that are still not needed; returns the number of bytes freed.

    Weights, rows and metrics are kept.
    """
    from sret_cli.training.checkpoint import remove_checkpoint

    removed = 0
    for checkpoints in found:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_directory(checkpoints.run))
            except Busy:
                continue
            now = _checkpoints(checkpoints.run, locks=False)
            if now.needed is None:
                removed += now.size_bytes
                for folder in now.folders:
                    remove_checkpoint(folder)
    return removed


def _checkpoints(run: Path, locks: bool = True) -> Checkpoints:
    folders = tuple(sorted(folder for folder in run.glob(CHECKPOINTS) if folder.is_dir()))
    return Checkpoints(run, folders, _needed(run, locks))


def _needed(run: Path, locks: bool) -> str | None:
    """The reason why the checkpoints of a run have to be kept, or None."""
    if not _is_finished(run):
        return "the run is not finished"
    if locks:
        try:
            with locked_directory(run):
                pass
        except Busy as error:
            return str(error).partition(";")[0]
    for config in sorted(run.parent.glob(f"*/{CONFIG_FILE}")):
        other = config.parent
        if _continues(config) == run.name and not _is_finished(other):
            if not any(other.glob(f"{CHECKPOINTS}/manifest.json")):
                return f"{other} continues from them"
    return None


def _is_finished(run: Path) -> bool:
    try:
        row = read_row(run)
    except SretError:  # a damaged row
        return False
    return row is not None and row["final_loss"] is not None and not row["error"]


def _continues(config: Path) -> Any:
    try:
        found = read_json(config)
    except SretError:  # damaged: this run cannot continue in any case
        return None
    return found.get("continues") if isinstance(found, dict) else None
