"""`sret clean` removes checkpoints of finished runs, and nothing else."""

import io
import json
import shutil
import subprocess
import sys

import pytest

from sret_cli.runtime.lock import locked_directory

STAY = {"config.json", "metrics.jsonl", "model.safetensors", "row.json", ".lock"}


@pytest.fixture
def run(finished_runs, sret, tmp_path):
    """The directory of a finished run."""
    shutil.copytree(finished_runs, tmp_path / "runs")
    (directory,) = tmp_path.glob("runs/train/*")
    return directory


def bytes_of(*folders):
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_checkpoints_of_finished_runs_are_removed_once_it_is_told_how_many_bytes(sret, run):
    size = bytes_of(run / "checkpoint-5")
    before = {name: (run / name).read_bytes() for name in STAY}
    told = f"{size:,} bytes of checkpoints"
    listed = f"runs/train/{run.name}: {told}\n"
    code, out, err = sret("clean")
    assert (code, out) == (2, listed)
    assert err == f"sret: nothing was removed; --yes removes {told} of 1 finished run\n"
    code, out, _ = sret("clean", "--dry-run")
    assert (code, out) == (0, f"{listed}would remove {told} of 1 finished run\n")
    assert (run / "checkpoint-5" / "manifest.json").exists()
    assert sret("clean", "--yes") == (0, f"{listed}removed {size:,} bytes\n", "")
    assert {name: (run / name).read_bytes() for name in names(run)} == before
    assert sret("clean") == (0, "no checkpoints of finished runs\n", "")


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_on_a_terminal_it_asks_first(sret, run, monkeypatch, answer, left):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    code, out, _ = sret("clean")
    assert code == 0
    assert ("nothing was removed" in out) == bool(left)
    assert len(list(run.glob("checkpoint-*"))) == left


@pytest.mark.parametrize("where", ["runs/train", "train", "studies/train.toml", "RUN"])
def test_a_study_or_a_run_can_be_named(sret, run, tmp_path, where):
    other = tmp_path / "runs" / "other" / "0123456789"
    (other / "checkpoint-5").mkdir(parents=True)
    (other / "row.json").write_bytes((run / "row.json").read_bytes())
    (other / "checkpoint-5" / "values.json").write_text("{}")
    size = bytes_of(run / "checkpoint-5")
    code, out, _ = sret("clean", where.replace("RUN", str(run)), "--yes", "--json")
    assert code == 0
    found = json.loads(out)
    assert [item["checkpoints"] for item in found["runs"]] == [1]
    assert (found["bytes"], found["removed_bytes"], found["needed"]) == (size, size, [])
    assert (other / "checkpoint-5").exists() and not (run / "checkpoint-5").exists()
    assert json.loads(sret("clean", "--dry-run", "--json")[1])["bytes"] == 2


@pytest.mark.parametrize(
    "row", [None, {"final_loss": None}, {"error": "diverged: the loss is nan"}]
)
def test_checkpoints_of_runs_that_are_not_finished_stay(sret, run, row):
    path = run / "row.json"
    found = json.loads(path.read_text())
    path.unlink() if row is None else path.write_text(json.dumps({**found, **row}))
    code, out, err = sret("clean", "--yes")
    assert (code, out) == (0, "no checkpoints of finished runs\n")
    assert err == f"runs/train/{run.name}: its checkpoints stay: the run is not finished\n"
    assert (run / "checkpoint-5" / "manifest.json").exists()


def test_checkpoints_of_a_run_that_a_process_works_on_stay(sret, run):
    code = (
        "import sys; from pathlib import Path\n"
        "from sret_cli.runtime.lock import locked_directory\n"
        "with locked_directory(Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", code, str(run)], **pipes)
    assert holder.stdout.readline() == b"locked\n"
    _, out, err = sret("clean", "--yes")
    holder.communicate()
    assert out == "no checkpoints of finished runs\n"
    assert f"its checkpoints stay: runs/train/{run.name} is in use by process {holder.pid}" in err
    with locked_directory(run):
        assert (run / "checkpoint-5" / "manifest.json").exists()


def test_checkpoints_that_another_run_is_about_to_go_on_from_stay(sret, run):
    config = json.loads((run / "config.json").read_text())
    longer = run.parent / "0123456789"
    longer.mkdir()
    (longer / "config.json").write_text(json.dumps({**config, "continues": run.name}))
    _, out, err = sret("clean", "--yes")
    assert out == "no checkpoints of finished runs\n"
    stay = f"its checkpoints stay: runs/train/{longer.name} continues from them\n"
    assert err == f"runs/train/{run.name}: {stay}"
    (longer / "checkpoint-7").mkdir()
    (longer / "checkpoint-7" / "manifest.json").write_text("{}")
    sret("clean", "--yes")
    assert not (run / "checkpoint-5").exists()
    assert (longer / "checkpoint-7").exists()


def test_more_epochs_of_a_run_without_checkpoints_are_refused_with_what_to_do(sret, run):
    assert sret("clean", "--yes")[0] == 0
    code, _, err = sret("train", "--resume", f"runs/train/{run.name}", "--epochs", 2)
    assert code == 5
    assert err.splitlines()[-1] == (
        f"sret: {run} has no checkpoint to resume from (`sret clean` removes them); train all "
        f"2 epochs again, or start with its weights by --set train.init={run}"
    )
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    code, _, err = sret("train", "--resume", f"runs/train/{run.name}")
    assert code == 0 and "already done" in err


def test_more_epochs_go_on_from_the_one_checkpoint_of_a_finished_run(sret, run):
    code, out, _ = sret("train", "--resume", f"runs/train/{run.name}", "--epochs", 2, "--json")
    (row,) = json.loads(out)
    assert (code, row["epochs_trained"], row["continues"]) == (0, 2, run.name)


def test_a_directory_that_is_not_there_is_refused(sret):
    code, _, err = sret("clean", "nowhere")
    assert (code, err) == (
        4,
        "sret: no directory runs/nowhere; name a study, a run, or the directory of all runs\n",
    )
