"""Reads files of tensors from others without trusting them.

Nothing in a file is executed, and no option changes that. Sizes are checked before anything is
allocated, and the tensors take no more memory than the file has bytes.
"""

import argparse
import pickletools
import re
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sret_cli.runtime.errors import CHECKPOINT, SretError, first_line
from sret_cli.weights.state_dicts import PLAIN_NAMES, Weights, choose_weights

# Names of zips that torch.save writes, also those of Lightning, Hugging Face and timm.
ZIP_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar")

# 2,000 layers are 48,030 tensors in the reference's layout, whose names and shapes take 6 MB in a
# safetensors header or a pickle.
MAX_TENSORS = 50_000
MAX_HEADER_BYTES = 16 * 2**20

# What a checkpoint's pickle may name, besides storages and types of torch. `weights_only`, which
# reads the file after this check, allows more: a bytearray of any size, and all that libraries have
# declared safe. The names torch._utils.… are written by torch.save, which may change them;
# `tests/weights/test_private_torch.py` has a test for that.
NAMES = {
    *("argparse.Namespace", "collections.OrderedDict", "_codecs.encode"),
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
    *("torch.Size", "torch.device"),
}
TYPES = re.compile(r"torch\.(storage\.)?(\w+Storage|b?float\d+|u?int\d+)")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint's file, with its keys unchanged; nothing in it is executed.

    The file is `.safetensors`, or a zip as torch.save writes it: `.pth`, `.pt`, `.ckpt`, `.bin` or
    `.tar`. The state dict may be under "model" or "state_dict", next to other values.

    Raises:
        SretError: the file cannot be read, is damaged or too large, or its state dict holds
            something other than tensors.
    """
    value, size = _read(path)
    return _checked(value, path, size)


def read_weights(path: Path, own: Collection[str] = (), averaged: bool = False) -> Weights:
    """The plain or the averaged weights in a checkpoint's file, as `choose_weights` finds them.

    Args:
        path: as `read_tensors` takes it.
        own: the first parts of the model's own keys, which are not removed as prefixes.
        averaged: take the averaged weights.

    Raises:
        SretError: as `read_tensors`, or as `choose_weights`.
    """
    value, size = _read(path)
    weights = choose_weights(value, str(path), own, averaged)
    if weights is None:  # then `_checked` raises and says what the file holds
        return Weights(_checked(value, path, size), "", False)
    return weights._replace(tensors=_checked(weights.tensors, path, size))


def _read(path: Path) -> tuple[Any, int]:
    """The content of a file, and its size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise SretError(f"cannot read {path}: {error.strerror}", CHECKPOINT) from None
    if path.suffix not in (*ZIP_SUFFIXES, ".safetensors"):
        raise SretError(
            f"{path}: a checkpoint ends in {', '.join(ZIP_SUFFIXES)} or .safetensors", CHECKPOINT
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path, start, size), size
    return _read_zip(path, start, size), size


def _looks_like(start: bytes) -> str:
    signatures = (b"PK\x03\x04", b"\x80", b"<", b"version https://git-lfs", b"")
    names = ("a zip", "a bare pickle", "HTML", "a pointer of git-lfs")
    if start[8:9] == b"{":
        return "safetensors"
    looks = [n for s, n in zip(signatures, names, strict=False) if start.lstrip().startswith(s)]
    return looks[0] if looks else "unknown data" if start else "empty"


def _read_safetensors(path: Path, start: bytes, size: int) -> dict[str, Tensor]:
    damaged = f"{path} is damaged or not a safetensors file"
    header = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        raise SretError(f"{damaged}: it is {_looks_like(start)}", CHECKPOINT)
    if header > min(size - 8, MAX_HEADER_BYTES):
        raise SretError(
            f"{damaged}: its header claims {header:,} bytes, and the file has {size:,}; "
            f"at most {MAX_HEADER_BYTES:,} are read",
            CHECKPOINT,
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SretError(f"{damaged}: {error}", CHECKPOINT) from None


def _read_zip(path: Path, start: bytes, size: int) -> Any:
    damaged = f"{path} is damaged or was not written by torch.save"
    if not start.startswith(b"PK\x03\x04"):
        raise SretError(f"{damaged}: it is {_looks_like(start)}, no zip", CHECKPOINT)
    try:
        strange = sorted(n for n in _names(path, size) if n not in NAMES and not TYPES.fullmatch(n))
        if not strange:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user gets one line
                return torch.load(path, map_location="cpu", weights_only=True)
    except SretError:
        raise
    except Exception as error:  # a foreign file can fail its readers in any way
        raise SretError(f"{damaged}: {first_line(error)}", CHECKPOINT) from None
    calls = ascii(", ".join(strange[:3]))[1:-1]
    raise SretError(
        f"{path} is refused: its pickle would call {calls}, and only tensors and plain values are "
        "read; save its state dict alone, or as safetensors",
        CHECKPOINT,
    )


def _names(path: Path, size: int) -> set[str]:
    """The classes and functions that a checkpoint's pickle names; refuses what is too large."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it has {len(pickles)} files data.pkl")
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its entries are larger than the file")
        if len(entries) > MAX_TENSORS or pickles[0].file_size > MAX_HEADER_BYTES:
            raise SretError(
                f"{path} has {len(entries):,} entries and a pickle of {pickles[0].file_size:,} "
                f"bytes; at most {MAX_TENSORS:,} and {MAX_HEADER_BYTES:,} are read",
                CHECKPOINT,
            )
        code = pickletools.genops(archive.read(pickles[0]))
        return {str(name).replace(" ", ".") for op, name, _ in code if op.name == "GLOBAL"}


def _checked(value: Any, path: Path, size: int) -> dict[str, Tensor]:
    """The state dict in the content of a file.

    Raises:
        SretError: it holds something other than plain tensors, or more bytes than the file.
    """
    for key in PLAIN_NAMES:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
            break
    if not isinstance(value, dict) or not value:
        raise SretError(f"{path} holds {type(value).__name__}, not named tensors", CHECKPOINT)
    if len(value) > MAX_TENSORS:
        raise SretError(
            f"{path} has {len(value):,} tensors; at most {MAX_TENSORS:,} are read", CHECKPOINT
        )
    room: dict[tuple, int] = {}
    for key, tensor in value.items():
        if not isinstance(key, str) or not key.isprintable():
            raise SretError(f"{path}: {key!r} is not the name of a tensor", CHECKPOINT)
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise SretError(f"{path}: {key} is not a tensor but {kind}", CHECKPOINT)
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        numbers = not (tensor.is_quantized or tensor.is_complex() or tensor.dtype is torch.bool)
        if not plain or not numbers:
            raise SretError(f"{path}: {key} is not a plain tensor of numbers", CHECKPOINT)
        room[tensor.data_ptr(), tensor.shape, tensor.stride()] = tensor.nbytes
    if sum(room.values()) > size:
        raise SretError(f"{path}: its tensors claim more bytes than the file has", CHECKPOINT)
    return {key: tensor.detach() for key, tensor in value.items()}
