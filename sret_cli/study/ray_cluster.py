"""A Ray cluster: the connection to it, and how many runs its nodes have room for.

Without an address, the cluster is of this machine and ends with the command.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from socket import create_connection
from typing import Any

from sret_cli.runtime.errors import USAGE, SretError, first_line
from sret_cli.study.engines import EngineOptions
from sret_cli.study.shares import cores, divide

CONNECT_SECONDS = 5.0  # for the port of an address to answer
ATTACH_SECONDS = 20.0  # for Ray to attach to a cluster; its own patience is 80 seconds
ATTACH = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"
OBJECT_STORE_BYTES = 10**8  # of our own cluster, which passes hardly any data
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES alone without GPUs
    "RAY_memory_monitor_refresh_ms": "0",  # in our own cluster, end no process to save memory
}


def import_ray() -> Any:
    """The package ray.

    Raises:
        SretError: it is not installed.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    try:
        import ray
    except ImportError:
        raise SretError(
            "--engine ray needs Ray; install it by pip install 'sret[ray]'", USAGE
        ) from None
    return ray


@contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to a cluster; without an address, a cluster on this machine for the context.

    Raises:
        SretError: the cluster cannot be reached.
    """
    own = {"num_cpus": cores(), "include_dashboard": False}
    own["object_store_memory"] = OBJECT_STORE_BYTES
    if address is not None:
        check_address(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else own),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise SretError(f"Ray does not start: {first_line(error)}", USAGE) from None
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would kill the workers at once
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Attaches to a cluster in another process, since Ray's attempt cannot be given up in this one.

    Raises:
        SretError: nothing answers at the address, or no cluster that this machine is part of.
    """
    host, _, port = address.rpartition(":")
    if address != "auto":
        if not host or not port.isdecimal() or "/" in host:
            raise SretError(f"--address {address}: write it as HOST:PORT, or auto", USAGE)
        try:
            create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise SretError(f"--address {address}: no answer ({reason})", USAGE) from None
    command = [sys.executable, "-c", ATTACH, address]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=ATTACH_SECONDS)
        told = found.stderr
        reason = (told.strip().splitlines() or ["Ray says nothing"])[-1]
        if found.returncode == 0:
            return
    except subprocess.TimeoutExpired as error:
        told = (error.stderr or b"").decode("utf-8", "replace")
        reason = f"no Ray cluster answers within {ATTACH_SECONDS:.0f} seconds"
    if "InvalidAuthToken" in told:
        reason = "the cluster asks for Ray's token: export RAY_AUTH_MODE=token on this machine"
    raise SretError(f"--address {address}: {reason}", USAGE)


@dataclass(frozen=True)
class Plan:
    """Runs at a time, and the CPUs and GPUs of each."""

    jobs: int
    cpus: int
    gpus: float
    why: str


def plan_jobs(
    nodes: Sequence[dict[str, float]], engine: EngineOptions, device: str, left: int
) -> Plan:
    """How many runs are done at a time, and with what each.

    By default every GPU has a run, or without GPUs every CPU. Each run has as many CPUs as leave
    room for the others at the same time.

    Args:
        nodes: the resources of each node.
        engine: the options of the command.
        device: auto, cpu or cuda.
        left: the number of runs.

    Raises:
        SretError: no node has room for a run.
    """
    processes, per_gpu = engine.gpus_per_run, engine.runs_per_gpu
    on_gpus = device != "cpu" and any(node.get("GPU") for node in nodes)
    if device.startswith("cuda") and not on_gpus:
        raise SretError(f"--device {device}: no node of the cluster has a GPU", USAGE)
    divide(1, device, ["0"] * processes * on_gpus, processes, per_gpu)  # refuses what local refuses
    kind = "GPU" if on_gpus else "CPU"

    def room(cpus: int) -> int:
        fitting = [node.get("CPU", 0) // cpus for node in nodes]
        if on_gpus:
            on_gpu = [node.get("GPU", 0) * per_gpu // processes for node in nodes]
            fitting = list(map(min, fitting, on_gpu))
        return int(sum(fitting))

    most = room(processes)
    if most == 0:
        raise SretError(
            f"--gpus-per-run {processes}: no node of the cluster has {processes} {kind}s", USAGE
        )
    jobs = min(engine.jobs or most, max(left, 1))
    widest = int(max(node.get("CPU", 0) for node in nodes))
    wide = [c for c in range(processes, widest + 1, processes) if room(c) >= min(jobs, most)]
    count = sum(node.get(kind, 0) for node in nodes)
    why = f"{count:g} {kind}s on {len(nodes)} nodes" if engine.jobs is None else "as asked for"
    why += f"; {most} fit at a time" if jobs > most else ""
    return Plan(jobs, max(wide), processes / per_gpu * on_gpus, why)
