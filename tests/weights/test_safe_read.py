import argparse
import json
import os
import pickle
import resource
import struct
import time
import warnings
import zipfile
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save, save_file

from sret_cli.runtime.errors import SretError
from sret_cli.weights import safe_read
from sret_cli.weights.safe_read import read_tensors


class Evil:
    """What a pickle can do: call anything, here `os.system`."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def refused(path):
    """The message with which a file is refused, quickly and without memory to speak of."""
    start = time.process_time()  # which other processes do not lengthen
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SretError) as error:
        read_tensors(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in kB
    assert error.value.code == 5
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 5
    assert grown < 300_000
    return str(error.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "value",
    [Evil(), {"model": {"weight": torch.zeros(3)}, "args": Evil()}],
    ids=["bare", "beside the weights"],
)
def test_a_pickle_that_would_execute_something_is_refused(here, value):
    torch.save(value, "evil.pth")
    assert "refused: its pickle would call posix.system" in refused(here / "evil.pth")
    (here / "bare.pth").write_bytes(pickle.dumps(value))
    assert "it is a bare pickle, no zip" in refused(here / "bare.pth")
    torch.save(value, "old.pt", _use_new_zipfile_serialization=False)
    assert "it is a bare pickle, no zip" in refused(here / "old.pt")
    for name in ("lightning.ckpt", "pytorch_model.bin", "model_best.pth.tar"):
        torch.save(value, name)
        assert "refused: its pickle would call posix.system" in refused(here / name)
    assert not (here / "executed").exists()


def test_classes_other_than_namespace_are_refused(here):
    torch.save({"model": {"w": torch.zeros(3)}, "args": here}, "path.pth")
    assert "its pickle would call pathlib" in refused(here / "path.pth")


def test_a_pickle_that_would_only_fill_the_memory_is_refused(here):
    class Fill:
        def __reduce__(self):
            return bytearray, (10**10,)

    torch.save({"model": {"weight": torch.zeros(3)}, "args": Fill()}, "fill.pth")
    assert "its pickle would call __builtin__.bytearray" in refused(here / "fill.pth")


def test_a_file_that_is_no_checkpoint_says_what_it_is(here):
    torch.save({"w": torch.zeros(3)}, "real.pth")
    save_file({"w": torch.zeros(3)}, "real.safetensors")
    zipped, tensors = (here / "real.pth").read_bytes(), (here / "real.safetensors").read_bytes()
    files = {
        "zip.safetensors": (zipped, "it is a zip"),
        "pickle.safetensors": (pickle.dumps({"w": 1}), "it is a bare pickle"),
        "tensors.pth": (tensors, "it is safetensors, no zip"),
        "page.pth": (b"<!DOCTYPE html><html>Quota exceeded", "it is HTML, no zip"),
        "page.safetensors": (b"<!DOCTYPE html><html>", "it is HTML"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
        "empty.pth": (b"", "it is empty"),
        "empty.safetensors": (b"", "it is empty"),
        "noise.pth": (bytes(range(200, 256)) * 9, "it is unknown data"),
        "table.csv": (b"a,b\n", "ends in .pth, .pt, .ckpt, .bin, .tar or .safetensors"),
    }
    for name, (content, message) in files.items():
        (here / name).write_bytes(content)
        assert message in refused(here / name), name
    assert "No such file" in refused(here / "none.pth")
    (here / "folder.pth").mkdir()
    assert "Is a directory" in refused(here / "folder.pth")


def test_a_truncated_file_is_refused(here):
    torch.save({"model": {"w": torch.randn(1000)}}, "whole.pth")
    whole = (here / "whole.pth").read_bytes()
    for length in (5, 100, len(whole) // 2, len(whole) - 1):
        (here / "part.pth").write_bytes(whole[:length])
        assert "is damaged or" in refused(here / "part.pth")
    whole = save({"w": torch.randn(1000)})
    for length in (5, 9, 60, len(whole) - 1):
        (here / "part.safetensors").write_bytes(whole[:length])
        assert "is damaged" in refused(here / "part.safetensors")


def test_damaged_pickles_are_refused_whatever_torch_makes_of_them(here):
    torch.save({"model": {"w": torch.randn(10)}}, "whole.pth")
    whole = bytearray((here / "whole.pth").read_bytes())
    start = whole.index(b"data.pkl") + 8
    for offset in range(start, start + 300, 7):
        damaged = bytearray(whole)
        damaged[offset] ^= 0x55
        (here / "damaged.pth").write_bytes(damaged)
        with warnings.catch_warnings(action="error"):  # they would stand beside the one line
            try:
                read_tensors(here / "damaged.pth")
            except SretError as error:
                assert error.code == 5


def test_zips_of_other_things_are_refused(here):
    with zipfile.ZipFile("junk.pth", "w") as archive:
        archive.writestr("holiday.jpg", b"0" * 100)
    assert "it has 0 files data.pkl" in refused(here / "junk.pth")
    with zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("x/data/0", b"0" * 10_000_000)
    assert "its entries are larger than the file" in refused(here / "bomb.pth")


def test_a_safetensors_header_of_a_gigabyte_is_not_read(here):
    with open("huge.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**30) + b"{")
        file.truncate(2**30 + 100)  # a hole: it takes no room on the disk
    assert "its header claims 1,073,741,824 bytes" in refused(here / "huge.safetensors")
    (here / "claim.safetensors").write_bytes(struct.pack("<Q", 2**30) + b"{" + b" " * 100)
    assert "claims 1,073,741,824 bytes, and the file has 109" in refused(here / "claim.safetensors")


@pytest.mark.slow
def test_a_hundred_thousand_keys_are_refused(here):
    one = torch.zeros(1)
    torch.save({f"a.{n}": one for n in range(100_000)}, "keys.pth")
    assert "100,000 tensors; at most 50,000 are read" in refused(here / "keys.pth")
    entries = {
        f"a.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)
    }
    header = json.dumps(entries).encode()
    (here / "keys.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "100,000 tensors; at most 50,000 are read" in refused(here / "keys.safetensors")


def test_a_zip_of_very_many_entries_is_refused(here, monkeypatch):
    monkeypatch.setattr(safe_read, "MAX_TENSORS", 20)
    torch.save({f"a.{n}": torch.zeros(1) for n in range(30)}, "many.pth")
    assert "at most 20 and 16,777,216 are read" in refused(here / "many.pth")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(here):
    torch.save({"w": torch.zeros(1).expand(10**12)}, "expanded.pth")
    assert "claim more bytes than the file has" in refused(here / "expanded.pth")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(1)], "holds list, not named tensors"),
        (torch.zeros(1), "holds Tensor, not named tensors"),
        ({}, "holds dict, not named tensors"),
        ({"model": {"w": 3}}, "w is not a tensor but int"),
        ({3: torch.zeros(1)}, "3 is not the name of a tensor"),
        ({"a\nb\x1b[2J": torch.zeros(1)}, r"'a\nb\x1b[2J' is not the name of a tensor"),
        ({"w": torch.eye(3).to_sparse()}, "would call torch._utils._rebuild_sparse_tensor"),
        ({"w": torch.zeros(3, dtype=torch.complex64)}, "w is not a plain tensor of numbers"),
        ({"w": torch.zeros(3).bool()}, "w is not a plain tensor of numbers"),
        ({"w": torch.zeros(3, device="meta")}, "would call torch._utils._rebuild_meta_tensor"),
    ],
)
def test_what_is_not_named_plain_tensors_is_refused(here, value, message):
    torch.save(value, "odd.pth")
    assert message in refused(here / "odd.pth")


def test_reading_leaves_torchs_list_of_safe_classes_as_it_was(here):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"w": torch.zeros(1)}, "a.pth")
    read_tensors(here / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before


def test_a_class_that_a_library_declared_safe_is_refused_all_the_same(here):
    with torch.serialization.safe_globals([Fraction]):
        torch.save({"w": torch.zeros(1), "half": Fraction(1, 2)}, "half.pth")
        assert "its pickle would call fractions.Fraction" in refused(here / "half.pth")
