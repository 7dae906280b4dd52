"""Several processes that train one model: how they start, agree with each other, and end together.

Each process is a rank; the first one leads: it alone writes files and talks to the user. What goes
wrong where all ranks meet is raised by all of them. What goes wrong on one rank alone, or ends it,
ends the others too: each rank has a heart that beats in the store which the ranks have found each
other by, and watches those of the others.
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
from sret_cli.runtime.errors import USAGE, SretError, as_loader_lost
from sret_cli.runtime.processes import rank_and_world_size
from sret_cli.runtime.signals import Interrupted, Stop
from sret_cli.training.heartbeat import BEAT_SECONDS, LATE_BEATS, Heartbeat


class Ranks:
    """The processes that train together, as one of them sees them; by itself without arguments.

    `lost` says that they can no longer talk to each other.
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
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are others."""
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

    @contextmanager
    def raise_together(self, stop: Stop | None = None) -> Iterator[None]:
        """What one rank raises within, a user's error or the wish to stop, all raise at its end.

        A signal that came ends the loader's processes too, which is no error then; else it is the
        user's that one of them is gone.
        """
        own: Exception | None = None
        try:
            yield
        except (SretError, Interrupted, RuntimeError) as error:
            own = error
            if isinstance(error, RuntimeError):
                if stop is not None and stop.explains(error):
                    assert stop.code is not None
                    own = Interrupted(stop.code)
                else:
                    own = as_loader_lost(error)
                    if own is None:
                        raise
            if not self.is_distributed:
                raise own from None
        if self.is_distributed:
            for found in self.gather_objects(own):
                if isinstance(found, SretError):
                    found.on_all_ranks, found.reported_here = True, self.is_leader
                if found is not None:
                    raise found

    @contextmanager
    def end_together(self) -> Iterator[None]:
        """What one rank raises within and the others do not ends them all, with its reason.

        Raises:
            SretError: another rank ended, or a rank died.
        """
        try:
            yield
        except Exception as error:
            if self.watch is None or getattr(error, "on_all_ranks", False):
                raise
            self.lost = True
            if self.is_lost_rank(error):
                raise self.watch.explain() from None
            self.watch.tell(error)
            raise

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether an error says that another rank is gone."""
        text = str(error).lower()
        return self.is_distributed and (
            isinstance(error, dist.DistError)
            or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))
        )

    def close(self) -> None:
        """Ends, where all ranks do so."""
        if self.watch is not None:
            self.gather(0)
            self.watch.ended.set()
            self.watch.join()
            dist.destroy_process_group()


ALONE = Ranks()


def start_ranks(device: str) -> Ranks:
    """The ranks that torchrun or Slurm started, once they have all found each other.

    On CUDA each has the GPU of its number on its machine, and tensors go by NCCL; all else goes by
    gloo.

    Raises:
        SretError: the device is not there, or they cannot find each other.
    """
    if rank_and_world_size()[1] < 2:
        return ALONE
    if ":" in device:
        raise SretError(
            f"--device {device} is one GPU, and each of {rank_and_world_size()[1]} processes takes "
            "its own; "
            "use --device cuda",
            USAGE,
        )
    target = choose_device(device)
    local_rank, rank, world_size = world_info_from_env()
    if target.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise SretError(
            f"process {local_rank + 1} of this machine has no GPU of its own, of "
            f"{torch.cuda.device_count()}; start as many processes a machine as it has GPUs",
            USAGE,
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SretError(
            f"{rank_and_world_size()[1]} processes need {' and '.join(missing)} (the first one's "
            "host and a free port) to find each other; export them, or unset SLURM_NTASKS to train "
            "in one",
            USAGE,
        )
    # torchrun keeps its store when it starts its processes again: the addresses of those before
    # are in it, and not to be taken for those of these.
    prefix = f"sret/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        found, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
        if target.type == "cuda":
            target = torch.device("cuda", local_rank)
            torch.cuda.set_device(target)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo",
            store=dist.PrefixStore(prefix, found),
            rank=rank,
            world_size=world_size,
        )
        # A connection of its own: that of the group is held where a rank waits for others.
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=timedelta(seconds=LATE_BEATS * BEAT_SECONDS),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise SretError(f"the processes do not find each other: {reason}", USAGE) from None
    watch = Heartbeat(rank, world_size, dist.PrefixStore(f"{prefix}/watch", own))
    ranks = Ranks(rank, world_size, target, watch)
    ranks.gather(0)  # now all beat
    watch.start()
    return ranks
