"""Where a training writes what it measures: `metrics.jsonl`, and TensorBoard where asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from sret_cli.runtime.files import LineFile

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """The lines of `metrics.jsonl`, from a position on; what stands after it is cut off.

    A line holds nothing of the time or the machine, so that the lines of a training that was
    interrupted are those of one that was not.
    """

    def __init__(
        self, directory: Path, position: int, step: int, board: bool, note: Callable[[str], None]
    ) -> None:
        self.file = LineFile(directory / METRICS_FILE, position)
        self.board = Board(directory / "tensorboard", step, note) if board else None

    @property
    def position(self) -> int:
        """Bytes that were written so far."""
        return self.file.position

    def write(self, at_step: int, **values: Any) -> None:
        """Writes one line; TensorBoard gets its numbers, at a step."""
        self.file.write(json.dumps(values, allow_nan=False))
        if self.board is not None:
            self.board.write(at_step, values)

    def sync(self) -> None:
        """Makes the lines so far survive a power cut."""
        self.file.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.__exit__()
        if self.board is not None:
            self.board.close()


class Board:
    """TensorBoard's writer, which is off for good, with one note, once anything in it fails."""

    def __init__(self, directory: Path, step: int, note: Callable[[str], None]) -> None:
        self.note = note
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=step or None)
        except Exception as error:  # a sink must not stop a run, whatever fails in it
            self._give_up(error)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the numbers of a line."""
        try:
            for name, value in values.items():
                if self.writer is not None and name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, step)
        except Exception as error:  # as above
            self._give_up(error)

    def close(self) -> None:
        """Writes what is left."""
        try:
            if self.writer is not None:
                self.writer.close()
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.writer = None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        self.note(f"TensorBoard is off: {reason}; pip install 'sret[tensorboard]', or leave it out")
