"""Conditions on rows: what they select, and what they refuse."""

import pytest

from sret_cli.runtime.errors import SretError
from sret_cli.study.where import column_named, known_columns, parse_condition, rows_where

ROWS = [
    {"name": "a", "layers": 4, "model.slices": [1, 1, 1], "train.lr": 1e-3, "top1_percent": 70.0},
    {"name": "b", "layers": 8, "model.slices": [4, 4, 4], "train.lr": 2e-3, "top1_percent": None},
    {"name": "c", "layers": 16, "model.slices": [4, 1, 4], "train.lr": 2e-3, "role": "twin layers"},
]


@pytest.mark.parametrize(
    ("condition", "names"),
    [
        ("layers == 8", "b"),
        ("layers != 8", "ac"),
        ("4 < layers <= 16", "bc"),
        ("16 > layers", "ab"),
        ("slices == 4", "b"),
        ("slices != 4", "ac"),
        ("model.slices == (4, 1, 4)", "c"),
        ("slices != [4, 1, 4]", "ab"),
        ("slices in [1, 4]", "abc"),
        ("slices in [(1, 1, 1), (4, 4, 4)]", "ab"),
        ("lr == 0.002 and not layers == 8", "c"),
        ("train.lr < 2e-3 or layers in [16]", "ac"),
        ("top1_percent > 60", "a"),
        ("top1 < 99", "a"),
        ("top1_percent == none", "bc"),
        ("role == 'twin layers'", "c"),
        ("name not in ('a', 'b')", "c"),
        ("layers > -1", "abc"),
    ],
)
def test_a_condition_selects_rows(condition, names):
    assert "".join(row["name"] for row in rows_where(ROWS, condition)) == names


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("__import__('os').system('true')", "is not a condition"),
        ("layers", "is not a condition"),
        ("layers = 4", "is not a condition"),
        ("layers == (lambda: 4)()", "does not compare a column with a value"),
        ("layers == 2 * 4", "does not compare a column with a value"),
        ("4 == 4", "does not compare a column with a value"),
        ("layers is 4", "does not compare a column with a value"),
        ("name.upper() == 'A'", "does not compare a column with a value"),
        ("name == f'{layers}'", "does not compare a column with a value"),
        ("name == a", 'write a text in quotation marks, as in name == "a"'),
        ("layers in 4", "write a list after `in`"),
        ("layer == 4", "no column 'layer'; did you mean layers"),
        ("name < 3", "which has no order with 3"),
        ("layers == 4 and", "is not a condition"),
        ("(" * 1_000 + "layers == 4" + ")" * 900, "is not a condition"),
        ("layers == 4 or " * 200 + "layers == 4", "over 2,000 characters long"),
        ("", "is not a condition"),
        ("layers == 4\0", "is not a condition"),
    ],
)
def test_what_is_not_a_comparison_of_columns_with_literals_is_refused(condition, message):
    with pytest.raises(SretError, match="^.*") as caught:
        rows_where(ROWS, condition)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2


def test_a_column_may_be_named_without_its_table():
    known = known_columns()
    assert column_named("recursions", known) == "model.recursions"
    assert column_named("lr", known) == "train.lr"
    assert column_named("seed", known) == "train.seed"
    assert column_named("model.timm_args.window_size", known) == "model.timm_args.window_size"
    with pytest.raises(SretError, match="no column 'learning'; did you mean learning_rate"):
        column_named("learning", known)


def test_a_condition_can_name_columns_that_only_the_rows_have():
    rows = [{"published_gmacs": 1.1, "layers": 20}]
    assert parse_condition("published_gmacs > 1", rows).holds(rows[0])
    with pytest.raises(SretError, match="no column 'published_gmacs'"):
        parse_condition("published_gmacs > 1")
