"""The table of settings: its lines, their order, their intervals and what is said under it."""

import pytest
from helpers import study_rows

from sret_cli.report.columns import COLUMNS
from sret_cli.report.summary import summarise
from sret_cli.study.axes import varying_fields
from sret_cli.study.view import ReportSpec

GRID = {"model.recursions": [1, 8], "train.seed": [0, 1]}


def texts(table):
    return [list(table.headings), *table.texts()]


def test_seeds_are_one_line_with_the_interval_of_their_mean():
    table = summarise(study_rows((90.0, 92.0, 94.0, 94.0), grid=GRID))
    assert texts(table) == [
        ["Layers", "Seeds", "FLOPs (G)", "Top-1 (%)"],
        ["4", "2", "0.00400", "91.00 ± 12.71"],  # t = 12.71, deviation / sqrt(2) = 1
        ["32", "2", "0.0320", "94.00 ± 0.00"],
    ]
    assert table.notes[0] == "Model: nano; Params (M): 0.33"  # the same in all lines
    assert table.notes[1] == (
        "±: 95 % confidence interval of the mean over seeds (Student's t), 2 seeds (0, 1)"
    )


def test_a_single_seed_has_the_interval_of_its_test_images():
    table = summarise(study_rows((90.0, 95.0), grid={"model.recursions": [1, 2]}))
    # Wilson's interval of 324 and 342 of 360, by hand.
    assert [line[-1] for line in table.texts()] == ["90.00 [86.47, 92.69]", "95.00 [92.24, 96.81]"]
    assert "[…]: 95 % interval of one run's test images (Wilson)" in table.notes[1]
    assert summarise(study_rows((90.0,)), ReportSpec(interval="sd")).texts()[0][-1] == "90.00"


def test_a_failed_run_is_named_with_its_reason_and_counts_for_nothing():
    rows = study_rows((90.0, 92.0, 94.0, 94.0), grid=GRID)
    rows[0] |= {"top1_percent": None, "error": "loss diverged"}
    table = summarise(rows)
    assert table.texts()[0] == ["4", "1", "0.00400", "92.00 [88.73, 94.38]"]
    failed = f"1 of 4 runs failed: nano, 4 layers, seed 0 ({rows[0]['run_id']}): loss diverged"
    assert failed in table.notes


def test_shared_twins_and_baselines_are_blocks_and_values_sort_where_they_belong():
    rows = study_rows(
        twins=["layers"], baselines=["test_vit"], grid={"model.recursions": [8, 1, 2]}
    )
    table = summarise(rows[::-1])
    assert table.headings[:3] == ("Model", "Role", "Layers")
    assert [line[:3] for line in table.texts()] == [
        ["nano", "shared", "4"],
        ["nano", "shared", "8"],
        ["nano", "shared", "32"],
        ["nano", "twin layers", "8"],
        ["nano", "twin layers", "32"],
        ["test_vit", "baseline", "–"],
    ]
    assert table.blocks == (3, 5)


def test_stage_tuples_are_folded_and_those_that_follow_from_the_layers_are_left_out():
    rows = study_rows(grid={"model.recursions": [1, 2], "model.slices": [1, 4]})
    table = summarise(rows)
    assert "model.recursions" not in table.columns
    index = table.columns.index("model.slices")
    assert [line[index].text for line in table.lines] == ["1", "1", "4", "4"]
    assert table.lines[0][index].value == (1, 1, 1)


def test_recursions_with_equal_layers_are_told_apart():
    table = summarise(study_rows(grid={"model.recursions": [[2, 2, 2], [4, 1, 2], [1, 2, 3]]}))
    assert [line[0].text for line in table.lines] == ["1-2-3", "2", "4-1-2"]


def test_columns_can_be_chosen_and_lines_sorted():
    rows = study_rows((90.0, 94.0, 92.0), grid={"model.recursions": [1, 2, 4]})
    spec = ReportSpec(columns=("top1_percent", "train.lr"), sort=("-top1_percent",))
    table = summarise(rows, spec)
    assert table.columns == ("layers", "top1_percent", "train.lr")
    assert [line[0].text for line in table.lines] == ["8", "16", "4"]
    assert [line[2].text for line in table.lines] == ["0.002"] * 3


def test_a_value_that_was_not_measured_sorts_last_and_is_a_dash():
    rows = study_rows((90.0,), grid={"model.recursions": [1, 2]})
    for sort in ("top1_percent", "-top1_percent"):
        table = summarise(rows, ReportSpec(sort=(sort,)))
        assert [line[-1].text for line in table.lines] == ["90.00", "–"] or sort == "x"
        assert table.lines[-1][-1].value is None


def test_fields_that_vary_are_columns_unless_they_follow_from_another():
    rows = study_rows(grid={"model.recursions": [1, 8], "train.seed": [0, 1]})
    assert varying_fields(rows) == []
    for row in rows[2:]:
        row["model.nll"] = "none"
    assert varying_fields(rows) == ["model.nll"]
    for row in rows[2:]:
        row["name"] = "bare"
    assert varying_fields(rows) == ["name"]


@pytest.mark.parametrize(
    ("column", "value", "deviation", "text"),
    [
        ("params", 14_657_700, None, "14.66"),
        ("macs", 166_367_070_720, None, "166.367"),
        ("macs", 4_574_208, None, "0.00457"),
        ("layers", 1000, None, "1,000"),
        ("top1_percent", 98.0555, 0.39, "98.06 ± 0.39"),
        ("step_seconds", 0.0507, None, "50.7"),
        ("top1_percent", 98.0555, 0.0, "98.06 ± 0.00"),
    ],
)
def test_values_are_shown_in_their_unit(column, value, deviation, text):
    assert COLUMNS[column].text(value, deviation) == text
