"""The measurements of a training step by step: `metrics.jsonl` and, on request, TensorBoard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import first_line
from sret_cli.runtime.files import LineFile, check_not_shorter, write_atomically

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes the lines of `metrics.jsonl` from a position in bytes on; removes those after it.

    A line has no times and nothing about the machine, so that a training that was interrupted
    writes the same lines as one that was not. `board` asks for TensorBoard, where `step` is the
    last step that it keeps.
    """

    def __init__(
        self, directory: Path, position: int, step: int, board: bool, note: Callable[[str], None]
    ) -> None:
        self.file = LineFile(directory / METRICS_FILE, position)
        self.board = Board(directory / "tensorboard", step, note) if board else None

    @property
    def position(self) -> int:
        """The length of the file in bytes."""
        return self.file.position

    def write(self, at_step: int, **values: Any) -> None:
        """Writes one line; TensorBoard gets its numbers under the step `at_step`."""
        self.file.write(json.dumps(values, allow_nan=False))
        if self.board is not None:
            self.board.write(at_step, values)

    def sync(self) -> None:
        """Makes the lines so far durable, also after a power cut."""
        self.file.sync()

    def close(self) -> None:
        """Closes the file and TensorBoard."""
        self.file.__exit__()
        if self.board is not None:
            self.board.close()


def copy_metrics(source: Path, target: Path, size: int) -> None:
    """Copies the first `size` bytes of `metrics.jsonl` from one directory to another.

    Raises:
        SretError: the file is shorter, or the copy cannot be written.
    """
    check_not_shorter(source / METRICS_FILE, size)
    lines = (source / METRICS_FILE).read_bytes() if size else b""
    write_atomically(target / METRICS_FILE, lines[:size])


class Board:
    """TensorBoard's writer; the first error in it is reported and turns it off."""

    def __init__(self, directory: Path, step: int, note: Callable[[str], None]) -> None:
        self.note = note
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=step or None)
        except Exception as error:  # no failure of TensorBoard may stop a run
            self._give_up(error)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the numbers of a line of metrics."""
        try:
            for name, value in values.items():
                if self.writer is not None and name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, step)
        except Exception as error:  # as above
            self._give_up(error)

    def close(self) -> None:
        """Writes what is still in memory, and ends."""
        try:
            if self.writer is not None:
                self.writer.close()
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.writer = None
        self.note(
            f"TensorBoard is off: {first_line(error)}; pip install 'sret[tensorboard]', or leave "
            "it out"
        )
