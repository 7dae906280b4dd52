import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_cli.report.groups import group_seeds, role_of, series_fields, setting
from sret_cli.report.summary import summarise
from sret_cli.runtime.errors import SretError
from sret_cli.study.file import study_from_tables
from sret_cli.study.rows import planned_row


def rows_of(**grid):
    """Planned rows of `nano` on digits, by a grid with `__` for the dot of a key."""
    axes = {key.replace("__", "."): values for key, values in grid.items()}
    tables = {"model": {"preset": "nano"}, "train": {}, "grid": axes}
    return [planned_row(run) for run in study_from_tables("depth", tables).runs]


def test_values_that_look_alike_when_they_are_rounded_are_different_settings():
    rows = rows_of(train__model_ema_decay=[0.9999999, 0.99999999])
    assert [len(group.rows) for group in group_seeds(rows)] == [1, 1]
    assert [line[0].text for line in summarise(rows).lines] == ["0.9999999", "0.99999999"]


def test_two_runs_with_one_seed_are_never_seeds_of_each_other():
    rows = rows_of(train__seed=[0, 1])
    again = {**rows[0], "run_id": "other"}
    continued = {**rows[1], "run_id": "longer", "continues": rows[1]["run_id"]}
    found = [[row["run_id"] for row in g.rows] for g in group_seeds([*rows, again, continued])]
    assert found == [[rows[0]["run_id"], rows[1]["run_id"]], ["other"], ["longer"]]


def test_seeds_are_grouped_although_each_samples_other_images_to_identify_the_data():
    rows = rows_of(train__seed=[0, 1])
    for row, sample in zip(rows, ("a1", "b2"), strict=True):
        row |= {"data_files_sha256": "f0", "data_sample_sha256": sample}
    assert [len(group.rows) for group in group_seeds(rows)] == [2]


def test_recursions_that_have_equal_layers_are_different_settings():
    rows = rows_of(model__recursions=[[2, 2, 2], [4, 1, 2], [1, 2, 3]])
    assert {row["layers"] for row in rows} == {8}
    groups = group_seeds(rows)
    assert len(groups) == 3
    assert series_fields(groups, "layers") == ["model.recursions"]


def test_a_line_over_the_learning_rate_joins_one_depth():
    groups = group_seeds(rows_of(model__recursions=[1, 4], train__lr=[1e-3, 2e-3]))
    assert series_fields(groups, "train.lr") == ["layers"]
    assert series_fields(groups, "layers") == ["train.lr"]
    assert series_fields(groups, "train.seed") == ["train.lr", "layers"]


def test_fields_that_leave_different_settings_in_one_line_are_refused():
    groups = group_seeds(rows_of(model__recursions=[1, 4], train__lr=[1e-3, 2e-3]))
    assert series_fields(groups, "layers", ["train.lr"]) == ["train.lr"]
    with pytest.raises(SretError, match="add a field to it: train.lr"):
        series_fields(groups, "layers", ["model.nll"])


def test_rows_of_earlier_versions_have_the_role_that_their_name_gives():
    row = {"name": "nano twin params", "model.recursions": [1, 1, 1]}
    assert role_of(row) == "twin params"
    assert role_of({"name": "nano", "model.recursions": [2, 2, 2]}) == "shared"
    plain = {"name": "deit_tiny_patch16_224", "model.backbone": "deit_tiny_patch16_224"}
    assert role_of({**plain, "model.recursions": 1, "model.share": 1}) == "baseline"
    assert role_of({**plain, "model.recursions": 2, "model.share": 1}) == "shared"


AXES = {
    "model.recursions": st.sampled_from([1, 2, [4, 1, 2], [1, 2, 3]]),
    "model.nll": st.sampled_from(["per_pass", "per_block", "none"]),
    "train.lr": st.sampled_from([1e-3, 1.0000001e-3, 2e-3]),
    "train.seed": st.integers(0, 2),
}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(list(AXES)), st.data(), min_size=1), st.data())
def test_no_group_has_two_settings_or_one_seed_twice(keys, data):
    grid = {
        key: data.draw(st.lists(AXES[key], min_size=1, max_size=3, unique_by=str)) for key in keys
    }
    rows = rows_of(**{key.replace(".", "__"): values for key, values in grid.items()})
    rows += [dict(row) for row in data.draw(st.lists(st.sampled_from(rows), max_size=3))]
    groups = group_seeds(data.draw(st.permutations(rows)))
    assert sum(len(group.rows) for group in groups) == len(rows)
    for group in groups:
        assert len({setting(row) for row in group.rows}) == 1
        seeds = [row["train.seed"] for row in group.rows]
        assert len(set(seeds)) == len(seeds)
