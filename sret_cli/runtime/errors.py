"""One-line errors for users, and the process exit codes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache

from sret_cli.runtime.processes import is_leader

USAGE, SPEC, DATA, CHECKPOINT, SOME_FAILED, RESOURCES = 2, 3, 4, 5, 6, 7


class SretError(Exception):
    """An error that the user can fix, in one line: what is wrong, with the values, and what to do.

    Args:
        message: the line.
        code: exit code of the process; by default 3, an invalid spec or study.
        table: rows of cells, headings first, that are printed above the line.
        status: outcome of the training, as the run's row records it.
    """

    def __init__(
        self,
        message: str,
        code: int = SPEC,
        table: Sequence[Sequence[str]] = (),
        status: str = "failed",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.table = table
        self.status = status


def first_line(error: BaseException, default: str | None = None) -> str:
    """The first line of an error's message; without one `default`, or else the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else default or type(error).__name__


def as_out_of_memory(error: BaseException) -> SretError | None:
    """The error for the user if torch or Python ran out of memory, else None."""
    text = str(error)
    told = ("out of memory", "can't allocate memory")
    if not isinstance(error, MemoryError) and not any(t in text.lower() for t in told):
        return None
    reason = first_line(error, "the allocator gave up")
    message = f"out of memory: {reason}; use a smaller batch or model"
    return SretError(message, RESOURCES, status="out_of_memory")


class LoaderLost(SretError):
    """A process that loads images has ended."""


# How torch words its messages about the processes of a DataLoader.
_ANY_PROCESS = "DataLoader worker"
_LOST_PROCESS = "DataLoader worker (pid"
_RAISED_BY_DATASET = "in DataLoader worker process"  # the worker is alive and passed on an error
_LOST_PINNING_THREAD = "Pin memory thread exited"


def names_loader_process(error: BaseException) -> bool:
    """Whether an error's message names a process of a `DataLoader`."""
    return _ANY_PROCESS in str(error)


def as_lost_process(error: BaseException, workers: int) -> RuntimeError | None:
    """The error of torch for a lost process, where that caused a loader's error; else None.

    torch raises that error only if it finds the process dead. But the pipes of a killed process
    break first, which raises an `OSError` or `EOFError`; and on CUDA they end the thread that pins
    memory.

    Args:
        error: what a `DataLoader` raised.
        workers: the number of its processes.
    """
    text = str(error)
    if isinstance(error, RuntimeError):
        lost = text.startswith(_LOST_PINNING_THREAD)
    else:  # an error of the dataset is raised in this process (no workers), or names its worker
        broken = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
        lost = broken and workers > 0 and _RAISED_BY_DATASET not in text
    if not lost:
        return None
    return RuntimeError(f"{_LOST_PROCESS} unknown) is gone: {type(error).__name__}: {text}")


def as_loader_lost(error: BaseException) -> LoaderLost | None:
    """The user's error where torch says that a loader's process is gone, else None."""
    if not isinstance(error, RuntimeError) or _LOST_PROCESS not in str(error):
        return None
    message = (
        "a process that loads images was killed (out of memory?); use fewer --workers, then start "
        "the same command again"
    )
    return LoaderLost(message, RESOURCES, status="loader_lost")


def nearest_choice(word: str, choices: list[str]) -> str:
    """Suggests the choice nearest to a misspelt word, or lists all choices."""
    match = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"choose from {', '.join(choices)}"


def nearest_choices(word: str, choices: Sequence[str], count: int = 5) -> str:
    """Suggests the choices nearest to a word, at most `count`; for names of which there are many.

    Choices that contain the word, or that begin like it, come before those that are merely alike.
    """
    begin = [choice for choice in choices if word[:3] and word[:3] in choice]
    near = list(dict.fromkeys((*get_close_matches(word, begin, n=count, cutoff=0.3), *begin)))
    near = [choice for choice in near if choice.startswith(word[:3]) or word in choice]
    near = list(dict.fromkeys((*near, *get_close_matches(word, choices, cutoff=0.5))))[:count]
    return f"did you mean {' or '.join(near)}?" if near else "`--json` shows the names"


def print_note(text: str) -> None:
    """Prints a line on stderr."""
    print(f"sret: {text}", file=sys.stderr, flush=True)


_shown_by: list[Callable[[str], None]] = [print_note]


@contextmanager
def notes_shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """Passes the text of every note to `show` for the duration of the context.

    A progress bar prints notes above itself; a training passes them to the caller's function.
    """
    _shown_by.append(show)
    try:
        yield
    finally:
        _shown_by.pop()


def show_note(text: str) -> None:
    """Shows one line that is not an error: on stderr, or through `notes_shown_by`."""
    _shown_by[-1](text)


@cache
def show_note_once(text: str) -> None:
    """Shows a note once per process, and only on the leading rank."""
    if is_leader():
        show_note(text)
