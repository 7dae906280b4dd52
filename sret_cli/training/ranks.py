"""The processes that train one model together: how they start, exchange values and end.

Each process is a rank. The first rank is the leader: it alone writes files and prints. An error
that is found where all ranks meet is raised by all of them. An error on one rank alone, or its
death, ends the others too: `Heartbeat` watches for that.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import world_info_from_env
from torch import Tensor

from sret_cli.runtime.device import choose_device
from sret_cli.runtime.errors import USAGE, SretError, as_loader_lost, first_line
from sret_cli.runtime.processes import rank_and_world_size
from sret_cli.runtime.signals import Interrupted, Stop
from sret_cli.training.heartbeat import BEAT_SECONDS, LATE_BEATS, Heartbeat
from sret_cli.training.rank_error import RankError

Failure = SretError | Interrupted


@contextmanager
def collected_failures(stop: Stop | None = None) -> Iterator[list[Failure]]:
    """Catches a user's error, a lost loader process or a request to stop, and adds it to the list.

    A signal also ends the loader's processes; with `stop`, that counts as the request to stop.
    """
    failures: list[Failure] = []
    try:
        yield failures
    except (SretError, Interrupted) as error:
        failures.append(error)
    except RuntimeError as error:
        if stop is not None and stop.explains(error):
            assert stop.code is not None
            failures.append(Interrupted(stop.code))
        elif (lost := as_loader_lost(error)) is not None:
            failures.append(lost)
        else:
            raise


class Ranks:
    """The processes that train together, as seen by one of them; a single process by default.

    `lost` says that they can no longer exchange values.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        watch: Heartbeat | None = None,
    ) -> None:
        self.rank, self.world_size, self.device, self.watch = rank, world_size, device, watch
        self.lost = False

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are other ranks."""
        return self.world_size > 1

    def gather(self, *values: int) -> list[tuple[int, ...]]:
        """Each rank's numbers, in the order of the ranks."""
        if not self.is_distributed:
            return [values]
        own = torch.tensor(values)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own)
        return [tuple(tensor.tolist()) for tensor in found]

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of the ranks."""
        found = [value] * self.world_size
        if self.is_distributed:
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any = None) -> Any:
        """The leading rank's value."""
        found = [value]
        if self.is_distributed:
            dist.broadcast_object_list(found)
        return found[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor)
        return tensor

    def raised_by_all(self, error: SretError) -> SretError:
        """The error to raise where every rank raises the same one; the leader reports it."""
        return RankError(error, reported_here=self.is_leader) if self.is_distributed else error

    @contextmanager
    def raise_together(self, stop: Stop | None = None) -> Iterator[None]:
        """If one rank fails within, all ranks raise its failure at the end of the block.

        `collected_failures` says what counts as a failure, and what `stop` is for.
        """
        with collected_failures(stop) as failures:
            yield
        for found in self.gather_objects(failures):
            for failure in found:
                raise failure if isinstance(failure, Interrupted) else self.raised_by_all(failure)

    @contextmanager
    def end_together(self) -> Iterator[None]:
        """If one rank alone fails within, all ranks end with its error.

        Raises:
            RankError: another rank failed or died.
        """
        try:
            yield
        except Exception as error:
            if self.watch is None or isinstance(error, RankError | Interrupted):
                raise
            self.lost = True
            if self.is_lost_rank(error):
                raise self.watch.wait_for_loss() from None
            self.watch.publish_error(error)
            if isinstance(error, SretError):
                raise RankError(error, reported_here=self.is_leader) from error
            raise

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether an error says that another rank is gone."""
        text = str(error).lower()
        return self.is_distributed and (
            isinstance(error, dist.DistError)
            or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))
        )

    def close(self) -> None:
        """Ends the heartbeat and the process group; all ranks have to call this."""
        if self.watch is not None:
            self.gather(0)
            self.watch.ended.set()
            self.watch.join()
            dist.destroy_process_group()


ALONE = Ranks()


def start_ranks(device: str) -> Ranks:
    """The ranks that torchrun or Slurm started, after all of them have found each other.

    On CUDA, a rank uses the GPU with its local number, and tensors are exchanged by NCCL; all other
    values are exchanged by gloo.

    Raises:
        SretError: the device does not exist, or the processes cannot find each other.
    """
    started = rank_and_world_size()[1]
    if started < 2:
        return ALONE
    if ":" in device:
        raise SretError(
            f"--device {device} is one GPU, but each of {started} processes takes its own; "
            "use --device cuda",
            USAGE,
        )
    target = choose_device(device)
    local_rank, rank, world_size = world_info_from_env()
    if target.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise SretError(
            f"process {local_rank + 1} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}; start one process for each GPU",
            USAGE,
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SretError(
            f"{started} processes need {' and '.join(missing)} (the host of the first process and "
            "a free port) to find each other; export them, or unset SLURM_NTASKS to train in one "
            "process",
            USAGE,
        )
    # torchrun keeps its store when it restarts the processes, and the store still has the addresses
    # of the processes before; the prefix keeps them apart.
    prefix = f"sret/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
        if target.type == "cuda":
            target = torch.device("cuda", local_rank)
            torch.cuda.set_device(target)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo",
            store=dist.PrefixStore(prefix, store),
            rank=rank,
            world_size=world_size,
        )
        # The heartbeat needs its own connection: a rank that waits for others blocks the group's.
        watch_store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=timedelta(seconds=LATE_BEATS * BEAT_SECONDS),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise SretError(
            f"the processes do not find each other: {first_line(error)}", USAGE
        ) from None
    watch = Heartbeat(rank, world_size, dist.PrefixStore(f"{prefix}/watch", watch_store))
    ranks = Ranks(rank=rank, world_size=world_size, device=target, watch=watch)
    ranks.gather(0)  # every heartbeat is in the store now
    watch.start()
    return ranks
