"""Which part of this machine each worker has: GPUs, threads, and processes that load images."""

import os
from dataclasses import dataclass

from sret_cli.runtime.errors import USAGE, SretError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Share:
    """The part of a machine that one worker has.

    Attributes:
        gpus: names of its GPUs for CUDA_VISIBLE_DEVICES; empty on a CPU.
        threads: threads of each of its processes.
        loaders: processes that load images for each of its processes.
        processes: processes of one run, which torchrun starts if there are several.
    """

    gpus: tuple[str, ...]
    threads: int
    loaders: int
    processes: int = 1

    def environment(self) -> dict[str, str]:
        """The variables that keep a worker within its share."""
        variables = dict.fromkeys(THREADS, str(self.threads))
        if self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return variables


def cores() -> int:
    """The cores that this process may use; in a Slurm job, at most those of the job."""
    known = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(count, int(os.environ.get("SLURM_CPUS_ON_NODE", count)))


def visible_gpus(device: str) -> list[str]:
    """The GPUs that a device name stands for, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if device == "cpu":
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",")[:count] if named else [str(number) for number in range(count)]
    number = device.partition(":")[2]
    return [names[int(number)]] if number and names else names


def divide(
    jobs: int,
    device: str,
    gpus: list[str],
    gpus_per_run: int = 1,
    runs_per_gpu: int = 1,
    loaders: int | None = None,
    cpus: int | None = None,
) -> list[Share]:
    """Divides a machine among `jobs` workers.

    On a CPU, a run's processes have the cores of the machine in equal parts, at least one thread
    each; threads and loader processes together are no more than the part. With GPUs, each worker
    sees its own: `gpus_per_run` of them, or one that `runs_per_gpu` workers share.

    Args:
        jobs: the number of workers.
        device: auto, cpu, cuda or cuda:N.
        gpus: the GPUs of this machine.
        gpus_per_run: GPUs of one run; on a CPU, the number of its processes.
        runs_per_gpu: workers that share a GPU.
        loaders: processes that load images, if the user gave them.
        cpus: the cores to divide; by default those that this process may use.

    Raises:
        SretError: there are too few GPUs.
    """
    if gpus_per_run > 1 and runs_per_gpu > 1:
        raise SretError("--gpus-per-run and --runs-per-gpu cannot be combined", USAGE)
    on_cpu = device == "cpu" or not gpus
    if gpus_per_run > 1 and on_cpu and device != "cpu":
        raise SretError(
            f"--gpus-per-run {gpus_per_run}: no CUDA device on this machine; leave it out, or add "
            "--device cpu, which trains each run with that many processes",
            USAGE,
        )
    if not on_cpu and gpus_per_run > len(gpus):
        raise SretError(f"--gpus-per-run {gpus_per_run}: {len(gpus)} GPUs are visible", USAGE)
    part = max((cpus or cores()) // (jobs * gpus_per_run), 1)
    if on_cpu:
        threads, loads = (part, 0) if loaders is None else (max(part - loaders, 1), loaders)
        return [Share((), threads, loads, gpus_per_run)] * jobs
    loads = min(part - 1, 8) if loaders is None else loaders
    shares = []
    for job in range(jobs):
        first = job * gpus_per_run // runs_per_gpu
        own = [gpus[(first + k) % len(gpus)] for k in range(gpus_per_run)]
        shares.append(Share(tuple(own), max(part - loads, 1), loads, gpus_per_run))
    return shares


def jobs_on_gpus(gpus: list[str], gpus_per_run: int = 1, runs_per_gpu: int = 1) -> int:
    """The workers that use every GPU of a machine once."""
    return max(len(gpus) * runs_per_gpu // gpus_per_run, 1)
