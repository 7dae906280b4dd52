import io

import pytest
from rich.console import Console

from sret_cli.runtime import progress
from sret_cli.runtime.errors import notes_shown_by, show_note
from sret_cli.runtime.progress import Display, Pace


class Clock:
    """A clock that goes on only where a test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_time_left_is_a_dash_until_three_steps_after_the_first_are_measured(clock):
    pace, told = Pace(), []
    for done in range(1, 7):
        clock.now += 600 if done == 1 else 2  # the first step compiles
        told.append(pace.left(done, 36))
    assert told == ["–", "–", "–", "0:01:04", "0:01:02", "0:01:00"]


def test_steps_of_an_earlier_process_are_not_counted_as_done_in_no_time(clock):
    pace = Pace()
    for done in (900, 901, 902, 903):
        clock.now += 60
        told = pace.left(done, 1000)
    assert told == "1:37:00"


def test_no_time_left_is_never_told_before_the_end(clock):
    pace = Pace()
    for done in range(1, 36):
        clock.now += 0.001
        told = pace.left(done, 36)
    assert told == "0:00:01"
    assert pace.left(36, 36) == "–"  # what comes after the last step takes time, too


def test_a_task_that_begins_again_is_measured_anew(clock):
    pace = Pace()
    for done in range(1, 9):
        clock.now += 1
        pace.left(done, 8)
    clock.now += 500
    assert [pace.left(done, 8) for done in (1, 2, 3)] == ["–", "–", "–"]
    clock.now += 30
    assert pace.left(4, 8) == "0:00:40"


def display_on(terminal):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, color_system=None, width=150)
    return Display(console, "depth", 2), screen


def test_outside_a_terminal_a_line_comes_every_30_seconds(clock):
    display, screen = display_on(False)
    with display.live():
        display.start("0123456789 nano, 8 layers, seed 0, lr 0.1")
        for done in range(1, 9):
            clock.now += 12
            display.on_step(done, 36, f"epoch 1/2, loss {done}")
    assert screen.getvalue().splitlines() == [
        "0123456789 nano, 8 layers, seed 0, lr 0.1: step 3 of 36, epoch 1/2, loss 3, – left",
        "0123456789 nano, 8 layers, seed 0, lr 0.1: step 6 of 36, epoch 1/2, loss 6, 0:06:00 left",
    ]


def test_on_a_narrow_screen_texts_are_cut_and_the_numbers_are_not():
    display, screen = display_on(True)
    display.console.width = 80
    with display.live():
        display.start("0123456789 nano, 8 layers, seed 0, lr 0.1, nll per_block, slices 4-2-1")
        display.on_step(7, 36, "epoch 1/2, loss 1.234, lr 0.002, 300 images/s, 0.4 GB")
        display.bars.refresh()
    assert " 7/36 – left, epoch" in screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_notes_of_all_kinds_are_shown_by_the_display_while_it_is_live(terminal, capsys):
    display, screen = display_on(terminal)
    with display.showing() as progress:
        progress.on_step(1, 10, "")
        show_note("[b]cat.png[/b] is left out")
    assert "[b]cat.png[/b] is left out\n" in screen.getvalue()
    show_note("later")
    assert capsys.readouterr() == ("", "sret: later\n")


def test_notes_go_to_the_innermost_function(capsys):
    outer, inner = [], []
    with notes_shown_by(outer.append):
        with notes_shown_by(inner.append):
            show_note("one")
        show_note("two")
    assert (outer, inner, capsys.readouterr().err) == (["two"], ["one"], "")
