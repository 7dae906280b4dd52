"""Which rows a report is about, and what it says of the others."""

import json

import pytest
from helpers import study_rows, write_rows

from sret_cli.report.changes import changes_table
from sret_cli.report.collect import collect
from sret_cli.runtime.errors import SretError

STUDY = """# Does depth pay?
#
# A line of explanation.

[model]
preset = "nano"

[train]

[grid]
"model.recursions" = [1, 8]
"train.seed" = [0, 1]

[report]
sort = ["-top1"]
"""
GRID = {"model.recursions": [1, 8], "train.seed": [0, 1]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a study file, and runs of it under runs/depth."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "depth.toml").write_text(STUDY)
    write_rows(study_rows((90.0, 92.0, 94.0, 94.0), grid=GRID), tmp_path / "runs")
    return tmp_path


def test_a_study_file_gives_its_question_and_what_to_show(place):
    found = collect([place / "depth.toml"], place / "runs")
    assert found.question == "Does depth pay?\n\nA line of explanation."
    assert found.spec.sort == ("-top1_percent",)
    assert (len(found.rows), found.missing, found.notes) == (4, [], [])


def test_missing_runs_are_said_and_others_are_left_out(place):
    (row,) = study_rows((50.0,), grid={"train.lr": [0.1]})
    write_rows([row], place / "runs")
    text = STUDY.replace("[1, 8]", "[1, 8, 2]")
    (place / "depth.toml").write_text(text)
    found = collect([place / "depth.toml"], place / "runs")
    assert len(found.rows) == 4
    assert len(found.missing) == 2
    assert found.notes[0].startswith("4 of 6 runs; missing: ")
    assert found.notes[1] == "1 other runs of depth are not in its file; --all shows them"
    assert len(collect([place / "depth.toml"], place / "runs", every=True).rows) == 5


def test_a_condition_selects_runs_and_flags_take_precedence(place):
    values = {"where": "layers > 4", "interval": "sd"}
    found = collect([place / "depth.toml"], place / "runs", values=values)
    assert [row["layers"] for row in found.rows.values()] == [32, 32]
    assert found.spec.interval == "sd"
    assert found.notes == ["2 runs do not meet 'layers > 4'"]
    with pytest.raises(SretError, match="none of 4 runs meets the condition 'layers > 99'"):
        collect([place / "depth.toml"], place / "runs", values={"where": "layers > 99"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": "ci99"}, "interval = 'ci99': input should be 'ci95', 'sd', 'sem' or 'none'"),
        ({"columns": ("top9",)}, "no column 'top9'; did you mean top"),
        ({"sort": ("-lyers",)}, "no column 'lyers'; did you mean layers"),
        ({"x": "shuffle"}, "shuffle is not a single number for each run"),
        ({"where": "layers"}, "'layers' is not a condition"),
    ],
)
def test_values_that_do_not_exist_are_refused_with_the_nearest(place, values, message):
    with pytest.raises(SretError) as caught:
        collect([place / "depth.toml"], place / "runs", values=values)
    assert message in str(caught.value)


def test_damaged_rows_are_left_out_and_named(place):
    directories = sorted((place / "runs" / "depth").iterdir())
    (directories[0] / "row.json").write_text('{"study": "depth", "run')
    (directories[1] / "row.json").write_text(json.dumps([1, 2]))
    row = json.loads((directories[2] / "row.json").read_text())
    (directories[2] / "row.json").write_text(json.dumps({**row, "top1_percent": "high"}))
    (place / "runs" / "depth" / "empty").mkdir()
    (place / "runs" / "depth" / "foreign").mkdir()
    (place / "runs" / "depth" / "foreign" / "row.json").write_text("[" * 100_000)
    (place / "runs" / "depth" / "folder" / "row.json").mkdir(parents=True)
    told = []
    found = collect([place / "runs" / "depth"], place / "runs", on_damaged=told.append)
    assert len(found.rows) == 1
    assert len(told) == 5
    assert all("row.json" in str(error) and "\n" not in str(error) for error in told)
    with pytest.raises(SretError, match=r"row\.json"):
        collect([place / "runs" / "depth"], place / "runs")


def test_rows_of_an_older_version_are_shown(place):
    directory = next((place / "runs" / "depth").iterdir())
    row = json.loads((directory / "row.json").read_text())
    for key in ("role", "twin_of", "status", "train.recompute", "best_top1_percent"):
        row.pop(key, None)
    (directory / "row.json").write_text(json.dumps(row))
    assert len(collect([place / "runs"], place / "runs").rows) == 4


def test_several_studies_are_kept_apart_and_what_differs_is_said(place):
    rows = study_rows((80.0, 81.0), model={"preset": "nano", "img_size": 32})
    write_rows([{**row, "study": "large"} for row in rows], place / "runs")
    found = collect([place / "depth.toml", place / "runs" / "large"], place / "runs")
    assert {row["study"] for row in found.rows.values()} == {"depth", "large"}
    (note,) = found.notes
    assert note.startswith("The studies differ in ")
    assert "16 (depth), 32 (large)" in note


def test_two_states_of_a_study_are_matched_by_run_id(place):
    after = study_rows((91.0, 92.0), grid=GRID)[:2]
    write_rows(after, place / "later")
    found = collect([place / "runs" / "depth", place / "later" / "depth"], place / "runs")
    labels = {row["study"] for row in found.rows.values()}
    assert labels == {str(place / "runs" / "depth"), str(place / "later" / "depth")}
    first, second = (list(source.rows.values()) for source in found.sources)
    table = changes_table(first, second, ("before", "after"))
    index = table.columns.index("top1_percent_difference")
    assert [line[index].text for line in table.lines] == ["+1.00", "+0.00"]
    assert table.notes == (
        "2 runs are in both; 1 of them measured exactly the same; 2 only in before",
    )


def test_nothing_to_report_is_one_line(tmp_path):
    with pytest.raises(SretError, match="no directory .*run a study first"):
        collect([], tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    with pytest.raises(SretError, match="no finished runs in"):
        collect([], tmp_path / "runs")
