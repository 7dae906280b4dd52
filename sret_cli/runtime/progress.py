"""Progress on stderr: bars on a terminal; elsewhere a line now and then."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from sret_cli.runtime.errors import notes_shown_by

OnStep = Callable[[int, int, str], None]  # steps done, steps in all, what to show
SECONDS_A_LINE = 30  # between lines of progress where there is no terminal
STEPS_TO_MEASURE = 3  # before the time that is left can be told; the first step is not counted


class Pace:
    """The time that the steps of one task have taken in this process, without the first one's.

    The first step is slow (compilers, caches, processes that start), and those that an earlier
    process did have no time here.
    """

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None

    def left(self, done: int, total: int) -> str:
        """The time that the other steps will take, at least a second; a dash if not known yet."""
        now = time.monotonic()
        if self.first is None or done <= self.first[0]:
            self.first = done, now
        before, since = self.first
        if done - before < STEPS_TO_MEASURE or done >= total:
            return "–"
        seconds = (now - since) / (done - before) * (total - done)
        return str(timedelta(seconds=max(math.ceil(seconds), 1)))


class ShortText(TextColumn):
    """A text on one line; on a narrow screen it is cut, and the bar and the numbers are not."""

    def __init__(self, text: str) -> None:
        super().__init__(text, markup=False, table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        """The text, cut to the column."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Display:
    """Progress on stderr: bars on a terminal; elsewhere a line now and then, and for each run."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console = console
        self.label, self.pace = title, Pace()
        self.line_at = time.monotonic() + SECONDS_A_LINE
        self.progress = Progress(
            ShortText("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            ShortText("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.overall = self.progress.add_task(title, total=total, text="", visible=total > 1)
        self.current = self.progress.add_task("", total=None, text="", visible=False)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shows the bars; notes of all kinds are shown over them."""
        with self.progress, notes_shown_by(self.note):
            yield

    def start(self, label: str) -> None:
        """Shows which run is under way."""
        self.label, self.pace = label, Pace()
        self.progress.reset(self.current, visible=True, text="", total=None)
        self.progress.update(self.current, description=label)

    def on_step(self, done: int, total: int, text: str) -> None:
        """Moves the bar of the run under way."""
        self._move(self.current, done, total, text)

    def _move(self, task: TaskID, done: int, total: int, text: str) -> None:
        left = f"{self.pace.left(done, total)} left"
        self.progress.update(task, completed=done, total=total, text=f"{left}, {text}")
        if not self.console.is_terminal and time.monotonic() >= self.line_at:
            self.line_at = time.monotonic() + SECONDS_A_LINE
            self.note(f"{self.label}: step {done:,} of {total:,}, {text}, {left}")

    def note(self, line: str) -> None:
        """Leaves a line, over the bars where there are any."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def showing(self) -> Iterator[OnStep]:
        """Shows one task without runs: hands out what it is to be told of its progress."""
        with self.live():
            self.progress.update(self.overall, visible=True)
            yield lambda done, total, text: self._move(self.overall, done, total, text)

    def finish(self, line: str) -> None:
        """Ticks a run off and leaves one line about it."""
        self.progress.advance(self.overall)
        self.note(line)
