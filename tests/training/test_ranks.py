import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.processes import places_of_rank, rank_and_world_size
from sret_cli.training import rank_error
from sret_cli.training.checkpoint import read_checkpoint
from sret_cli.training.rank_error import RankError, original_error, wait_until_reported

ROOT = Path(__file__).parent.parent.parent
HARNESS = ROOT / "tests" / "end_to_end" / "rank_harness.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# Two epochs of ten steps.
COMMAND = (
    *("-m", "sret_cli", "train", "--preset", "nano", "--device", "cpu", "--workers", "0"),
    *("--set", "model.embed_dims=[8, 16, 32]", "--batch-size", "136", "--epochs", "2"),
    *("--set", "train.warmup_epochs=0", "--checkpoint-every-steps", "3"),
)


def environment(**values):
    folders = (ROOT, ROOT / "tests", HARNESS.parent, os.environ.get("PYTHONPATH", ""))
    paths = os.pathsep.join(map(str, folders))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **values}


def run(command, folder, check=True, **values):
    """Runs a command in a folder and waits for its end; it takes a few seconds."""
    done = subprocess.run(
        command, cwd=folder, env=environment(**values), capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def numbers(directory):
    return [value for line in lines(directory) for value in line.values()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The files of two ranks and of one process, in double precision."""
    folder = tmp_path_factory.mktemp("two")
    code = (
        "import sys; from pathlib import Path\n"
        "from rank_harness import PUBLISHED, RUN, in_double, train, train_until\n"
    )
    double = code + "in_double(); train(RUN, Path(sys.argv[1]))"
    single = code + "train_until(20, PUBLISHED, Path(sys.argv[1]))"
    run((sys.executable, "-c", single, "published one"), folder)
    run((sys.executable, "-c", double, "one"), folder)
    stopped = run((*TORCHRUN, "2", str(HARNESS), "."), folder, check=False)
    assert (folder / "stopped").exists(), stopped.stderr
    # One process resumes where two sharded ones were stopped.
    state = read_checkpoint(folder / "stopped" / "checkpoint-7")
    run((sys.executable, "-c", double, "stopped"), folder)
    return folder, state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "sharded", "stopped"])
def test_one_and_two_ranks_write_the_same_metrics(two, kind):
    folder, _ = two
    assert len(lines(folder / "one")) == 20 + 2
    assert numbers(folder / kind) == pytest.approx(numbers(folder / "one"), abs=1e-6, rel=0)


@pytest.mark.slow
def test_one_and_two_ranks_have_the_same_losses_in_single_precision_by_the_published_recipe(two):
    folder, _ = two
    one, ranks = (
        [line["loss"] for line in lines(folder / name) if "step" in line]
        for name in ("published one", "published")
    )
    assert len(one) == 20
    assert ranks == pytest.approx(one, abs=1e-5, rel=0)


@pytest.mark.slow
def test_a_signal_on_one_rank_stops_both_after_the_same_step(two):
    _, state = two
    assert (state["progress"]["step"], state["progress"]["images"]) == (7, 7 * 136)


@pytest.mark.slow
def test_checkpoints_of_sharded_weights_equal_those_of_unsharded_weights(two):
    folder, _ = two
    plain, sharded = (
        read_checkpoint(folder / kind / "checkpoint-20") for kind in ("plain", "sharded")
    )
    for part in ("model", "ema"):
        assert {k: v.shape for k, v in plain[part].items()} == {
            k: v.shape for k, v in sharded[part].items()
        }
        for name, tensor in plain[part].items():
            assert torch.allclose(tensor, sharded[part][name], atol=1e-7)
    assert plain["optimizer"].keys() == sharded["optimizer"].keys()
    assert plain["optimizer"]["param_groups"] == sharded["optimizer"]["param_groups"]
    names = [path.name for path in sorted((folder / "sharded").iterdir())]
    assert names == [path.name for path in sorted((folder / "plain").iterdir())]


@pytest.mark.slow
def test_every_test_image_is_counted_once_and_the_row_has_the_number_of_processes(two):
    folder, _ = two
    row = json.loads((folder / "row.json").read_text())
    assert (row["test_images"], row["world_size"], row["epochs_trained"]) == (360, 2, 2)


@pytest.mark.slow
def test_the_error_names_a_killed_rank_and_torchrun_resumes_the_training(tmp_path):
    run((*TORCHRUN, "2", *COMMAND, "--runs", "whole"), tmp_path)
    (whole,) = (tmp_path / "whole" / "train").iterdir()
    # The first rank ends by SIGKILL at step 14; after that it does not write as many lines.
    script = (f"{ROOT}/tests/end_to_end/kill_points.py", "metrics.jsonl line:15")
    command = (*TORCHRUN, "2", "--max-restarts", "1", *script, *COMMAND[2:])
    killed = run(command, tmp_path)
    (line,) = [line for line in killed.stderr.splitlines() if line.startswith("sret:")]
    assert re.match(r"sret: rank 0 of 2 \(process \d+ on .*\) died; start the same command", line)
    again = tmp_path / "runs" / "train" / whole.name
    assert [line.get("step") for line in lines(again)] == [
        *range(1, 11),
        None,
        *range(11, 21),
        None,
    ]
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


OUT_OF_MEMORY = """
import os, sys, torch
from sret_cli.commands import app
from sret_cli.training.trainer import Trainer

plain = Trainer.loss

def loss(self, x, target):
    if self.progress.step == 5 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    return plain(self, x, target)

Trainer.loss = loss
app.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_out_of_memory_on_one_rank_ends_all_and_the_row_has_its_reason(tmp_path):
    (tmp_path / "script.py").write_text(OUT_OF_MEMORY)
    done = run((*TORCHRUN, "2", "script.py", *COMMAND[2:]), tmp_path, check=False)
    (row,) = (tmp_path / "runs" / "train").glob("*/row.json")
    found = json.loads(row.read_text())
    assert found["status"] == "out_of_memory"
    assert found["error"].startswith("rank 1: out of memory at step 6 with 68 images at a time")
    assert done.stderr.count("sret: rank 1: out of memory at step 6") == 1


@pytest.mark.slow
def test_an_error_of_all_ranks_is_reported_once(tmp_path):
    done = run(
        (*TORCHRUN, "2", *("141" if part == "136" else part for part in COMMAND)),
        tmp_path,
        check=False,
    )
    assert done.stderr.count("141 does not divide among 2 processes; use 142") == 1
    assert re.findall(r"exitcode *: (-?\d+)", done.stderr)[0] == "3"
    assert not (tmp_path / "runs").exists()


def test_a_rank_error_keeps_its_original_and_is_reported_by_one_rank(monkeypatch):
    original = SretError("the disk is full", 7, status="disk_full")
    error = RankError(original, reported_here=False)
    assert (str(error), error.code, error.status) == ("the disk is full", 7, "disk_full")
    assert original_error(error) is original_error(original) is original
    assert not wait_until_reported(error)
    assert wait_until_reported(RankError(original, reported_here=True))
    slept = []
    monkeypatch.setattr(rank_error.time, "sleep", slept.append)
    assert wait_until_reported(original) and slept == []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wait_until_reported(original) and slept == [5.0]


def test_the_places_of_a_rank_in_a_batch_are_two_ranges_that_mirror_each_other():
    assert [places_of_rank(8, rank, 2) for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert places_of_rank(8, 0, 1) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [places_of_rank(6, rank, 2) for rank in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert [places_of_rank(8, rank, 2, 2) for rank in (0, 1)] == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_torchrun_comes_before_slurm_and_one_task_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert rank_and_world_size() == (3, 4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_and_world_size() == (0, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank_and_world_size() == (0, 1)


def test_sharding_by_one_process_is_refused(sret):
    code, _, err = sret("train", "--shard", "--preset", "nano")
    assert (code, "--shard needs several processes" in err) == (2, True)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("flags", [(), ("--shard",)])
def test_two_gpus_train_as_one_does(tmp_path, flags):
    command = [word.replace("cpu", "cuda") for word in COMMAND]
    run((*TORCHRUN, "1", *command, "--runs", "one"), tmp_path)
    run((*TORCHRUN, "2", *command, *flags, "--runs", "two"), tmp_path)
    first, second = (lines(*(tmp_path / name / "train").iterdir())[0] for name in ("one", "two"))
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
