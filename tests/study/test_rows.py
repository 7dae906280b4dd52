import json
import os
from pathlib import Path

import pytest

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.files import LineFile, make_directory, write_json
from sret_cli.study.rows import newest_run, read_rows


def row(study, run_id, started_at):
    known = {"study": study, "run_id": run_id, "started_at": started_at}
    return {**known, "layers": 8, "final_loss": 1.0}


def write(root, **values):
    directory = make_directory(root / values["study"] / values["run_id"])
    write_json(directory / "row.json", row(**values))


def test_rows_are_what_the_run_directories_hold(tmp_path):
    write(tmp_path, study="b", run_id="1", started_at="2026-01-02")
    write(tmp_path, study="a", run_id="3", started_at="2026-01-03")
    write(tmp_path, study="a", run_id="2", started_at="2026-01-01")
    assert [r["run_id"] for r in read_rows(tmp_path)] == ["2", "3", "1"]
    assert [r["run_id"] for r in read_rows(tmp_path / "a")] == ["2", "3"]
    assert [r["run_id"] for r in read_rows(tmp_path / "a" / "3")] == ["3"]
    assert newest_run(tmp_path) == tmp_path / "a" / "3"


def test_a_directory_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(SretError, match="no directory"):
        read_rows(tmp_path / "runs")


def test_a_damaged_row_is_named(tmp_path):
    write(tmp_path, study="a", run_id="1", started_at="2026")
    (tmp_path / "a" / "1" / "row.json").write_text('{"study": "a"')
    with pytest.raises(SretError, match=r"a/1/row\.json is not JSON"):
        read_rows(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "3"])
def test_another_document_is_no_row(tmp_path, text):
    (tmp_path / "row.json").write_text(text)
    with pytest.raises(SretError, match="row.json is not a row"):
        read_rows(tmp_path)


def test_the_newest_run_is_found_from_any_directory_above_it(tmp_path):
    write(tmp_path, study="a", run_id="1", started_at="2026")
    assert newest_run(tmp_path / "a") == tmp_path / "a" / "1"


def test_lines_are_there_as_soon_as_they_are_written_and_a_full_disk_is_said_so(tmp_path):
    with LineFile(tmp_path / "metrics.jsonl") as file:
        file.write("one")
        assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
    with pytest.raises(SretError, match="no room left") as refused:
        LineFile(Path("/dev/full")).write("one")
    assert refused.value.code == 7


def test_a_line_that_the_disk_takes_a_part_of_is_taken_back(tmp_path):
    class NearlyFull:
        def __init__(self, file, room):
            self.file, self.room = file, room
            self.truncate, self.seek = file.truncate, file.seek

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = min(len(data), self.room, 3)
            self.room -= taken
            return self.file.write(data[:taken])

    path = tmp_path / "metrics.jsonl"
    with LineFile(path) as file:
        opened = file.file
        file.file = NearlyFull(opened, room=12)
        file.write("seven77")
        with pytest.raises(SretError, match=r"no room left .* \(7 bytes, and") as refused:
            file.write("six666")
        assert refused.value.code == 7
        assert (path.read_text(), file.position) == ("seven77\n", 8)
        file.file = opened
        file.write("one")
    assert (path.read_text(), file.position) == ("seven77\none\n", 12)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SretError, match="no room left") as refused:
        write_json(path, {"a": 2})
    assert refused.value.code == 7
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["row.json"]


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "row.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SretError, match="choose another directory") as refused:
        make_directory(tmp_path / "file" / "runs")
    assert refused.value.code == 2
