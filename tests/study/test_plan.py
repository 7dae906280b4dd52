from sret_cli.study.file import load_study
from sret_cli.study.plan import match_rows
from sret_cli.study.rows import planned_row

STUDY = """
twins = ["layers"]
[model]
preset = "nano"
[train]
epochs = 1
warmup_epochs = 0
[grid]
"model.recursions" = [1, 2]
"""


def rows_of(path):
    return [planned_row(run) | {"started_at": "2026"} for run in load_study(path).runs]


def test_rows_are_matched_with_the_runs_of_the_file_and_the_others_are_named(tmp_path):
    path = tmp_path / "depth.toml"
    path.write_text(STUDY)
    rows = rows_of(path)
    path.write_text(STUDY.replace("[1, 2]", "[1, 2, 4]"))
    plan = match_rows(path, rows)
    assert [row["run_id"] for row in plan.rows] == [row["run_id"] for row in rows]
    assert [label.partition(", seed")[0].split(" ", 1)[1] for label in plan.missing] == [
        "nano, 16 layers",
        "nano twin layers, 16 layers",
    ]
    path.write_text(STUDY.replace("[1, 2]", "[1]"))
    plan = match_rows(path, rows)
    assert len(plan.rows) == 1 and len(plan.others) == 2 and plan.missing == []


def test_rows_of_earlier_versions_get_their_role_and_their_pair_from_the_file(tmp_path):
    path = tmp_path / "depth.toml"
    path.write_text(STUDY)
    rows = rows_of(path)
    old = [{k: v for k, v in row.items() if k not in ("role", "twin_of")} for row in rows]
    plan = match_rows(path, old)
    assert [row["role"] for row in plan.rows] == ["shared", "shared", "twin layers"]
    assert [row["twin_of"] for row in plan.rows] == [None, None, rows[1]["run_id"]]


def test_without_its_data_a_study_takes_all_rows(tmp_path):
    path = tmp_path / "photos.toml"
    path.write_text('[model]\npreset = "nano"\n[train]\ndata_dir = "nowhere"\n')
    plan = match_rows(path, [{"run_id": "a"}])
    assert (plan.rows, plan.missing) == ([{"run_id": "a"}], [])
