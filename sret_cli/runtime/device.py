"""Devices: their names, their memory, their precision, and deterministic kernels."""

import os
import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from sret_cli.runtime.errors import USAGE, SretError

if TYPE_CHECKING:
    import torch


def use_deterministic_kernels(device: "torch.device") -> None:
    """Makes CUDA deterministic as far as torch has deterministic kernels; a CPU always is."""
    import torch

    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def autocast(device: "torch.device", precision: str) -> "torch.autocast":
    """The context in which a model of this precision runs; with fp32 it changes nothing."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def device_type(name: str) -> str:
    """The kind of device that a name such as "cuda:1" stands for: auto, cpu or cuda.

    Raises:
        SretError: the name is not that of a device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise SretError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N", USAGE)
    return name.partition(":")[0]


def choose_device(name: str) -> "torch.device":
    """The device of a name; "auto" is CUDA if a GPU is available, else the CPU.

    A GPU named by its number ("cuda:1") becomes torch's current device. On a CPU, denormal numbers
    (below 1e-38) count as zero from now on in this thread and the threads that it starts: they
    change no visible result, and slow deep random networks down.

    Raises:
        SretError: the device does not exist.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, number = device_type(name), name.partition(":")[2]
    if kind == "cuda" and not torch.cuda.is_available():
        raise SretError("no CUDA device on this machine; use --device cpu", USAGE)
    if kind == "cpu":
        torch.set_flush_denormal(True)
    if not number:
        return torch.device(name)
    index, count = int(number), torch.cuda.device_count()
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise SretError(f"no device {name} on this machine; it has {there}", USAGE)
    torch.cuda.set_device(index)  # also for what torch draws or allocates without naming a device
    return torch.device("cuda", index)


def device_name(device: "torch.device") -> str:
    """The device's name, as rows record it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def free_bytes(device: "torch.device") -> int:
    """Bytes that a process can still allocate, on the GPU or (with caches) this machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if table.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text())
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def synchronize(device: "torch.device") -> None:
    """Waits until all kernels on a CUDA device have run; on a CPU there are none to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used_bytes(device: "torch.device") -> int:
    """Bytes that this process holds of a GPU's memory; 0 on a CPU."""
    import torch

    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def peak_gigabytes(device: "torch.device") -> str:
    """The peak memory so far, as text: of CUDA's allocator, or of this process."""
    import torch

    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{used / 1e9:.1f} GB"
