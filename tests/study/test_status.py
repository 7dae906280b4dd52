"""What the runs of a study are doing, from their directories alone."""

import json
import os
import socket
import subprocess
import sys

import pytest
from helpers import study_rows, write_rows

from sret_cli.runtime.files import write_json
from sret_cli.runtime.progress import Progress
from sret_cli.study.deaths import record_death
from sret_cli.study.file import study_from_tables
from sret_cli.study.live import LiveFile, read_live
from sret_cli.study.status import count_states, study_status

GRID = {"model.recursions": [1, 2, 4], "train.seed": [0, 1]}
STUDY = """
[model]
preset = "nano"
[train]
[grid]
"model.recursions" = [1, 2, 4]
"train.seed" = [0, 1]
"""


@pytest.fixture
def place(tmp_path):
    """A study of six runs: done, failed, lost, running here, interrupted, and one not begun."""
    (tmp_path / "depth.toml").write_text(STUDY)
    runs = study_from_tables("depth", {"model": {"preset": "nano"}, "train": {}, "grid": GRID}).runs
    rows = study_rows((90.0,), grid=GRID)
    rows[0]["final_loss"] = 0.5
    rows[1] |= {"status": "diverged", "error": "the loss diverged"}
    rows[2] |= {"status": "lost", "error": "its process was ended"}
    write_rows(rows[:3], tmp_path / "runs")
    for run in runs[:5]:
        directory = run.directory(tmp_path / "runs")
        directory.mkdir(parents=True, exist_ok=True)
        config = {"study": "depth", "name": run.name, **run.spec()}
        write_json(directory / "config.json", config)
    directory = runs[3].directory(tmp_path / "runs")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2026-01-01T00:00:00"}
    write_json(directory / ".lock.json", holder)
    LiveFile(directory).write(3, 10, "epoch 1/2, loss 2.000")
    directory = runs[4].directory(tmp_path / "runs")
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    write_json(directory / ".lock.json", {**holder, "pid": int(done.stdout)})
    LiveFile(directory).write(7, 10, "epoch 2/2, loss 1.000")
    return tmp_path


def test_each_run_has_a_state(place):
    for path in (place / "depth.toml", None):
        found = study_status(path, place / "runs")
        states = sorted(status.state for status in found)
        expected = ["done", "failed", "lost", "running", "waiting"]
        assert states == sorted([*expected, "waiting"] if path else expected)
    running = next(status for status in found if status.state == "running").record()
    assert (running["step"], running["steps"], running["pid"]) == (3, 10, os.getpid())
    stopped = next(status for status in found if status.state == "waiting").record()
    assert (stopped["step"], stopped["text"]) == (7, "epoch 2/2, loss 1.000")


def test_a_run_of_another_machine_is_running_while_it_says_so(place):
    (directory,) = [
        d.parent for d in place.glob("runs/depth/*/progress.json") if "3" in d.read_text()
    ][:1]
    write_json(directory / ".lock.json", {"pid": 1, "host": "elsewhere", "since": "2026-01-01"})
    assert count_states(study_status(None, place / "runs"))["running"] >= 1
    live = json.loads((directory / "progress.json").read_text())
    write_json(directory / "progress.json", {**live, "at": "2026-01-01T00:00:00+00:00"})
    states = {s.directory: s.state for s in study_status(None, place / "runs")}
    assert states[directory] == "waiting"


def test_the_command_shows_states_and_reasons(sret, place):
    code, out, _ = sret("status", place / "depth.toml", "--runs", place / "runs")
    assert code == 0
    assert out.splitlines()[0] == "6 runs: 1 done, 1 running, 2 waiting, 1 failed, 1 lost"
    assert "the loss diverged" in out
    assert "stopped at step 7 of 10" in out
    assert f"process {os.getpid()} on {socket.gethostname()}" in out
    code, out, _ = sret("status", "--runs", place / "runs", "--json")
    assert (code, len(json.loads(out))) == (0, 5)
    code, _, err = sret("status", "--runs", "nowhere")
    assert (code, err) == (4, "sret: no directory nowhere; start runs by `sret run STUDY`\n")


def test_damaged_files_do_not_hide_the_other_runs(place):
    directory = next((place / "runs" / "depth").iterdir())
    (directory / "config.json").write_text("{")
    (directory / "row.json").write_text("[]")
    (directory / "progress.json").write_text('{"step": "x"}')
    (directory / ".lock.json").write_text("3")
    (directory / "deaths.json").write_text("{}")
    assert len(study_status(None, place / "runs")) == 5
    assert len(study_status(place / "depth.toml", place / "runs")) == 6


def test_progress_is_written_every_two_seconds_at_most(tmp_path):
    now = [100.0]
    live = LiveFile(tmp_path, clock=lambda: now[0])
    seen = []
    progress = live.following(Progress(on_step=lambda *step: seen.append(step)))
    for step, seconds in ((1, 0.0), (2, 1.0), (3, 2.5)):
        now[0] = 100 + seconds
        progress.on_step(step, 10, "text")
        assert read_live(tmp_path)["step"] == {1: 1, 2: 1, 3: 3}[step]
    assert len(seen) == 3
    live.remove()
    assert read_live(tmp_path) is None


def test_a_run_is_lost_after_more_deaths_than_retries(tmp_path):
    (run,) = study_from_tables("depth", {"model": {"preset": "nano"}, "train": {}}).runs
    (tmp_path / "worker.log").write_text("one\n\nSegmentation fault\n")
    for pid in (1, 2):
        assert record_death(run, tmp_path, pid, "signal 11 (SIGSEGV)", retries=2) is None
    row = record_death(run, tmp_path, 3, "signal 11 (SIGSEGV)", retries=2)
    assert row["status"] == "lost"
    assert row["error"] == (
        "its process was ended by signal 11 (SIGSEGV), 3 times in all; last lines of worker.log: "
        "one; Segmentation fault"
    )
    assert json.loads((tmp_path / "row.json").read_text()) == row
