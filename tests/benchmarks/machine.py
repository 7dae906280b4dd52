"""What the benchmarks say of the machine that they ran on."""

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Processor or GPU, threads, and the versions of torch and Python."""
    table, name = Path("/proc/cpuinfo"), platform.processor()
    if table.exists():
        names = [x.partition(":")[2] for x in table.read_text().splitlines() if "model name" in x]
        name = names[0].strip() if names else name
    device = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}"
