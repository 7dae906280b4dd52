import errno
import json
import os
import random
import subprocess

import pytest
import torch

from sret_cli.runtime.errors import SretError
from sret_cli.training.checkpoint import CheckpointWriter, newest_checkpoint, read_checkpoint
from sret_cli.training.state import (
    flatten_state,
    random_states,
    set_random_states,
    unflatten_state,
)


def nothing():
    """Has nothing to make durable."""


def state(value=1.0):
    shared = torch.full((3, 2), value)
    return {
        "model": {"a.weight": shared, "b.weight": shared, "count": torch.tensor(7)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(2.0), "square": torch.ones(2).bfloat16()}}
        },
        "random": torch.arange(9, dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
        "plain": [1, 2.5, "three", None, True, (4, (5,)), {"six": 6}],
    }


def write(directory, *steps):
    writer = CheckpointWriter(directory)
    for step in steps:
        writer.write(step, state(float(step)), nothing)
    writer.wait()
    writer.close()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_state_is_read_as_it_was_written(tmp_path):
    write(tmp_path, 1)
    found = newest_checkpoint(tmp_path, print).state
    assert found["plain"] == [1, 2.5, "three", None, True, (4, (5,)), {"six": 6}]
    assert found["model"]["a.weight"].tolist() == [[1.0, 1.0]] * 3
    assert found["model"]["count"].dtype == torch.int64
    assert found["optimizer"]["state"][0]["square"].dtype == torch.bfloat16
    assert found["random"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert found["mask"].tolist() == [True, False]


def test_a_tied_tensor_is_stored_once_and_tied_again():
    tensors, values = flatten_state(state())
    assert "model/a.weight" in tensors and "model/b.weight" not in tensors
    model = unflatten_state(tensors, values)["model"]
    assert model["a.weight"] is model["b.weight"]


def test_floats_are_read_bitwise_as_they_were_written(tmp_path):
    numbers = [0.1 + 0.2, 1e-310, 2.0**-1074, 1 / 3]
    tensors, values = flatten_state({"numbers": numbers})
    assert unflatten_state(tensors, json.loads(json.dumps(values)))["numbers"] == numbers


def test_changes_during_the_writing_of_a_checkpoint_are_not_in_it(tmp_path):
    writer, tensor = CheckpointWriter(tmp_path), torch.zeros(100_000)
    writer.write(1, {"a": tensor}, lambda: tensor.fill_(2))
    tensor.fill_(1)
    writer.wait()
    assert newest_checkpoint(tmp_path, print).state["a"].unique().tolist() == [0.0]
    writer.close()


def test_the_two_newest_are_kept_and_older_ones_are_removed_after_the_new_one_is_durable(tmp_path):
    seen = []
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2, 10):
        writer.write(step, state(), lambda: seen.append(names(tmp_path)))
    writer.wait()
    writer.close()
    assert seen[-1] == ["checkpoint-1", "checkpoint-10", "checkpoint-2"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2"]


def test_every_one_of_a_thousand_flipped_bits_is_detected(tmp_path):
    write(tmp_path, 1)
    path, draw, detected = tmp_path / "checkpoint-1", random.Random(0), 0
    files = sorted(path.iterdir())
    assert [f.name for f in files] == ["manifest.json", "tensors.safetensors", "values.json"]
    for number in range(1000):
        file = files[number % 3]
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(SretError, match=f"checkpoint-1 is damaged .{file.name}"):
            read_checkpoint(path)
        detected += 1
        file.write_bytes(data)
    assert detected == 1000
    assert read_checkpoint(path)["plain"][0] == 1


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors", "values.json"])
def test_every_truncation_is_detected(tmp_path, name):
    write(tmp_path, 1)
    file = tmp_path / "checkpoint-1" / name
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(SretError, match="is damaged"):
            read_checkpoint(file.parent)


def test_the_note_names_a_damaged_checkpoint_and_the_one_that_is_used(tmp_path):
    write(tmp_path, 1, 2)
    file = tmp_path / "checkpoint-2" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    notes = []
    assert newest_checkpoint(tmp_path, notes.append).path.name == "checkpoint-1"
    (line,) = notes
    assert "checkpoint-2 is damaged (tensors.safetensors has" in line
    assert line.endswith("checkpoint-1")
    (tmp_path / "checkpoint-1" / "values.json").unlink()
    with pytest.raises(SretError, match="no checkpoint is left to resume from") as refused:
        newest_checkpoint(tmp_path, notes.append)
    assert refused.value.code == 5


def test_a_checkpoint_without_its_manifest_is_ignored(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    notes = []
    assert newest_checkpoint(tmp_path, notes.append).path.name == "checkpoint-1"
    assert notes == []


def test_a_run_that_resumes_removes_damaged_checkpoints_after_it_wrote_a_newer_one(tmp_path):
    write(tmp_path, 1, 5)
    (tmp_path / "checkpoint-5" / "values.json").write_text("{}")
    writer = CheckpointWriter(tmp_path, newest_checkpoint(tmp_path, print).path)
    writer.write(3, state(), nothing)
    writer.wait()
    writer.close()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_a_full_disk_leaves_the_last_checkpoint_and_the_error_gives_the_bytes(
    tmp_path, monkeypatch
):
    write(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, tmp_path / "checkpoint-1")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.write(2, state(), nothing)
    with pytest.raises(SretError, match=r"tensors.safetensors \([\d,]+ bytes, and .*-1 is intact"):
        writer.wait()
    monkeypatch.undo()
    writer.close()
    assert names(tmp_path) == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path, print).path.name == "checkpoint-1"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(small_disk):
    write(small_disk, 1)
    writer = CheckpointWriter(small_disk, small_disk / "checkpoint-1")
    writer.write(2, {"large": torch.zeros(2**18)}, nothing)
    with pytest.raises(SretError, match=r"\(1,048,656 bytes, and .* are free\)") as refused:
        writer.wait()
    writer.close()
    assert (refused.value.code, refused.value.status) == (7, "disk_full")
    assert names(small_disk) == ["checkpoint-1"]
    assert read_checkpoint(small_disk / "checkpoint-1")["plain"][0] == 1


def test_random_generators_continue_from_a_saved_state():
    states = random_states()
    drawn = [random.random(), torch.rand(2).tolist()]
    set_random_states(unflatten_state(*flatten_state({"states": states}))["states"])
    assert [random.random(), torch.rand(2).tolist()] == drawn
