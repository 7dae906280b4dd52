"""Progress on stderr: bars on a terminal, elsewhere a line every 30 seconds."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from sret_cli.runtime.errors import notes_shown_by, print_note

OnStep = Callable[[int, int, str], None]  # steps done, all steps, text to show
OnNote = Callable[[str], None]  # one line for the user
SECONDS_A_LINE = 30  # between lines of progress without a terminal
STEPS_TO_MEASURE = 3  # before the time left is estimated; the first step does not count


def ignore_step(done: int, total: int, text: str) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Progress:
    """Functions that receive the progress of long work, and notes for the user.

    Attributes:
        on_step: called with the steps done, all steps, and a text.
        note: called with one line at a time; prints it on stderr by default.
    """

    on_step: OnStep = ignore_step
    note: OnNote = print_note


class Pace:
    """Estimates the time left from the steps that this process did after the first.

    The first step is slow (compilation, caches, processes that start). Steps of an earlier process
    were not timed here.
    """

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None

    def left(self, done: int, total: int) -> str:
        """The estimated time left, at least a second; a dash while it is not known."""
        now = time.monotonic()
        if self.first is None or done <= self.first[0]:
            self.first = done, now
        before, since = self.first
        if done - before < STEPS_TO_MEASURE or done >= total:
            return "–"
        seconds = (now - since) / (done - before) * (total - done)
        return str(timedelta(seconds=max(math.ceil(seconds), 1)))


class ShortText(TextColumn):
    """A column of text on one line, which is cut on a narrow screen before bar and numbers are."""

    def __init__(self, text: str) -> None:
        super().__init__(text, markup=False, table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        """The text, cut to the width of the column."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Display:
    """Shows progress on stderr: bars on a terminal, elsewhere lines, also one for each run."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console = console
        self.label, self.pace, self.finished = title, Pace(), 0
        self.line_at = time.monotonic() + SECONDS_A_LINE
        self.bars = bars.Progress(
            ShortText("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            ShortText("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.overall = self.bars.add_task(title, total=total, text="", visible=total > 1)
        self.running: dict[str, TaskID] = {}
        self.current = self.bars.add_task("", total=None, text="", visible=False)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shows the bars, and prints all notes above them."""
        with self.bars, notes_shown_by(self.note):
            yield

    def start(self, label: str) -> None:
        """Shows which run is in progress."""
        self.label, self.pace = label, Pace()
        self.bars.reset(self.current, visible=True, text="", total=None)
        self.bars.update(self.current, description=label)

    def on_step(self, done: int, total: int, text: str) -> None:
        """Moves the bar of the run in progress."""
        self._move(self.current, done, total, text)

    def of_run(self) -> Progress:
        """The progress of the run that is shown."""
        return Progress(self.on_step, self.note)

    def _move(self, task: TaskID, done: int, total: int, text: str) -> None:
        left = f"{self.pace.left(done, total)} left"
        self.bars.update(task, completed=done, total=total, text=f"{left}, {text}")
        if not self.console.is_terminal and time.monotonic() >= self.line_at:
            self.line_at = time.monotonic() + SECONDS_A_LINE
            self.note(f"{self.label}: step {done:,} of {total:,}, {text}, {left}")

    def note(self, line: str) -> None:
        """Prints a line that stays, above the bars."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def showing(self) -> Iterator[Progress]:
        """Shows the progress of one task that has no runs."""
        with self.live():
            self.bars.update(self.overall, visible=True)
            yield Progress(partial(self._move, self.overall), self.note)

    def tell(self, text: str) -> None:
        """Shows a text at the end of the bar of all runs."""
        self.bars.update(self.overall, text=text)

    def show_runs(self, runs: Mapping[str, tuple[int, int, str]]) -> None:
        """Shows a bar for each run under way, by label: steps done, all steps, and a text."""
        for label in self.running.keys() - runs.keys():
            self.bars.remove_task(self.running.pop(label))
        for label, (done, total, text) in runs.items():
            if label not in self.running:
                self.running[label] = self.bars.add_task(label, text="")
            self.bars.update(self.running[label], completed=done, total=total, text=text)

    def finish(self, line: str) -> None:
        """Counts a run as finished, and prints one line about it."""
        self.finished += 1
        self.bars.advance(self.overall)
        self.note(line)
