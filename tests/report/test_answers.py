"""The answer of a study in sentences, whose numbers are worked out by hand."""

from helpers import study_rows

from sret_cli.report.answers import answers
from sret_cli.report.comparisons import compare

GRID = {"model.recursions": [2, 4], "model.slices": [1, 4], "train.seed": [0, 1]}


def test_a_study_is_answered_by_its_paired_differences_and_its_best_runs():
    shared = (91.0, 92.0, 90.0, 91.0, 95.0, 96.0, 94.0, 95.0)
    twins = (90.0, 91.5, 89.0, 90.0, 90.0, 91.0, 89.0, 90.0)
    rows = study_rows((*shared, *twins), grid=GRID, twins=["layers"])
    found = answers(rows, compare(rows), missing=0)
    assert found == [
        "Shared minus twin layers at 16 layers: +5.00 ± 0.00 points of top-1, with 1.00 times its "
        "parameters and 1.00 times its FLOPs. The interval excludes 0 in 3 of 4 comparisons.",
        "Slices 4 minus 1, all else equal: -1.06 ± 0.15 points of top-1 (95 % interval over 8 "
        "pairs of runs).",
        "Best shared: slices 1, layers 16: 95.50 ± 6.35 % top-1 (2 seeds), 0.33 M parameters, "
        "0.0160 G FLOPs.",
        "Best twin layers: slices 1, layers 8: 90.75 ± 9.53 % top-1 (2 seeds), 0.33 M parameters, "
        "0.00800 G FLOPs.",
    ]


def test_what_is_not_done_comes_first_and_what_is_not_sure_is_said():
    rows = study_rows(
        (91.0, 92.0, 91.0, 91.5), grid={"train.seed": [0, 1], "model.recursions": [2]}
    )
    rows = study_rows((91.0, 92.0, 91.0, 91.5), twins=["layers"], grid={"train.seed": [0, 1]})
    found = answers([*rows, {**rows[0], "error": "diverged"}], compare(rows), missing=2)
    assert found[0] == "4 of 7 runs are done; 1 failed; 2 have no row yet."
    assert found[1] == (
        "No difference between shared models and their controls is sure: none of 1 paired "
        "differences in top-1 has a 95 % interval that excludes 0."
    )
