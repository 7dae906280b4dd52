"""Tables on terminals of any width."""

import pytest
from helpers import study_rows
from rich.console import Console

from sret_cli.report.summary import summarise
from sret_cli.report.table import text_table
from sret_cli.report.terminal import fitted_table
from sret_cli.study.view import ReportSpec

COLUMNS = ("params", "macs", "activation_bytes", "test_loss", "test_images", "top1_percent")


def printed(table, width, encoding="utf-8"):
    console = Console(width=width, highlight=False, markup=False, color_system=None)
    with console.capture() as capture:
        console.print(fitted_table(table, width))
    return capture.get().splitlines()


def rows():
    return study_rows(
        (90.0, 92.0, 94.0, 94.5),
        grid={"model.recursions": [1, 250], "train.seed": [0, 1]},
    )


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120, 200])
def test_no_number_is_broken_at_any_width(width):
    lines = printed(summarise(rows(), ReportSpec(columns=COLUMNS)), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "1,000" in text
    assert "91.00 ± 12.71" in text
    assert "94.25 ± 3.18" in text


def test_columns_that_do_not_fit_are_named():
    lines = printed(summarise(rows(), ReportSpec(columns=COLUMNS)), 70)
    told = " ".join(line.strip() for line in lines)
    assert "Not shown for want of room: Test loss, Test images." in told
    assert "Top-1 (%)" in told  # the last to go


@pytest.mark.parametrize("width", [20, 40, 59])
def test_on_a_narrow_terminal_each_line_is_a_block(width):
    lines = printed(summarise(rows()), width)
    assert max(map(len, lines)) <= width
    assert "Layers: 1,000" in lines
    if width > 20:
        assert "Top-1 (%): 91.00 ± 12.71" in lines


def test_long_names_are_folded_and_never_cut():
    table = text_table(["Model", "Top-1 (%)"], [["x" * 100, "91.00"]])
    lines = printed(table, 60)
    assert max(map(len, lines)) <= 60
    assert "".join(lines).count("x") == 100
