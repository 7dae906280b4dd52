import pytest

from sret_cli.report.comparisons import compare, comparison_table
from sret_cli.study.file import study_from_tables
from sret_cli.study.rows import planned_row

# Top-1 of the shared model and of its twin by seed: differences of 1, 2 and 3 points.
SHARED_TOP1, TWIN_TOP1 = (91.0, 92.0, 93.0), (90.0, 90.0, 90.0)


def rows(seeds=3, **tables):
    """Rows of a shared model of 8 layers and of its twin with as many layers."""
    study = study_from_tables(
        "depth",
        {
            "model": {"preset": "nano"},
            "train": {},
            "twins": ["layers"],
            "grid": {"train.seed": list(range(seeds))},
            **tables,
        },
    )
    made = [planned_row(run) for run in study.runs]
    for row in made:
        top1 = (SHARED_TOP1 if row["role"] == "shared" else TWIN_TOP1)[row["train.seed"]]
        params = 100 if row["role"] == "shared" else 200
        row |= {"top1_percent": top1, "test_loss": 0.5, "params": params, "macs": 1000}
    return made


def test_a_twin_knows_the_run_that_it_is_the_control_of():
    made = rows(seeds=2)
    assert [row["role"] for row in made] == ["shared", "shared", "twin layers", "twin layers"]
    assert [row["twin_of"] for row in made[2:]] == [row["run_id"] for row in made[:2]]


def test_differences_are_taken_seed_by_seed_with_their_interval():
    (found,) = compare(rows())
    assert (found.top1.mean, found.top1.n) == (2.0, 3)
    assert found.top1.half_width == pytest.approx(2.484137711719546)  # as of 1, 2, 3
    assert found.loss == (0.0, 0.0, 3)
    assert (found.params_ratio, found.macs_ratio) == (0.5, 1.0)
    table = comparison_table([found])
    assert dict(zip(table.headings, table.texts()[0], strict=True)) == {
        "Model": "nano",
        "Against": "twin layers",
        "Layers": "8",
        "Seeds": "3",
        "Δ top-1 (points)": "+2.00 ± 2.48",
        "Δ test loss": "+0.000 ± 0.000",
        "Params ratio": "0.50",
        "FLOPs ratio": "1.00",
    }


def test_a_difference_is_bold_only_where_its_interval_excludes_zero():
    made = rows()
    for row in made:
        row["top1_percent"] = 90.0 + row["train.seed"] + 5 * (row["role"] == "shared")
    ((*_, top1, _, _, _),) = comparison_table(compare(made)).lines
    assert (top1.text, top1.bold) == ("+5.00 ± 0.00", True)
    ((*_, top1, _, _, _),) = comparison_table(compare(made[:1] + made[3:4])).lines
    assert (top1.text, top1.bold) == ("+5.00", False)  # one seed shows nothing


def test_failed_runs_and_runs_of_another_seed_are_in_no_pair():
    made = rows()
    made[0] |= {"error": "diverged", "top1_percent": None}
    (found,) = compare(made)
    assert found.top1.n == 2
    assert compare([made[1], made[5]]) == []


def test_a_baseline_is_compared_at_the_same_training_and_seed():
    made = rows(baselines=["test_vit"], twins=[])
    for row in made:
        row["top1_percent"] = 90.0 if row["role"] == "baseline" else 80.0
    (found,) = compare(made)
    assert (found.top1.mean, found.top1.half_width, found.top1.n) == (-10.0, 0.0, 3)
