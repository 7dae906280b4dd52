"""Several processes that train one model: how they start, agree with each other, and end together.

Each process is a rank; the first one leads: it alone writes files and talks to the user. What goes
wrong where all ranks meet is raised by all of them. What goes wrong on one rank alone, or ends it,
ends the others too: each rank has a heart that beats in the store which the ranks have found each
other by, and watches those of the others.
"""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import world_info_from_env
from torch import Tensor

from sret_cli.errors import USAGE, SretError, lost_loader
from sret_cli.interrupt import AGAIN, Interrupted, Stop
from sret_cli.measure import choose_device
from sret_cli.processes import started_as

BEAT_SECONDS = 1.0
LATE_BEATS = 30  # a rank that has been silent for so many of our own beats is dead,
SOON_BEATS = 5  # and for so few where a connection has broken: of pauses of all ranks it is none
GRACE_SECONDS = 10.0  # for a thread that waits for a dead rank, where nothing tells it


class Watch(threading.Thread):
    """This rank's heart: tells that it lives, and finds out which rank does not, and why.

    A thread that waits on a GPU for a rank which is dead cannot be woken; the process is then ended
    from here.
    """

    def __init__(self, rank: int, world_size: int, store: Any) -> None:
        super().__init__(daemon=True, name="watch")
        self.rank, self.world_size, self.store = rank, world_size, store
        self.ended, self.known, self.leaving = (threading.Event() for _ in range(3))
        self.loss = self._of_dead([])
        self.store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self.store.set(f"beat/{rank}", "0")

    def run(self) -> None:
        """Beats, until something is wrong or all is done."""
        beats, seen, silent = 0, [b""] * self.world_size, [0] * self.world_size
        while not self.known.is_set():
            if self.ended.wait(BEAT_SECONDS):
                return
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                now = self.store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])
                told = self.store.get("reason") if self.store.check(["reason"]) else b""
            except RuntimeError:  # the store is the first rank's, or its torchrun's
                now, told = [b"", *seen[1:]], b""
                silent[0] = LATE_BEATS
            silent = [n + 1 if a == b else 0 for n, a, b in zip(silent, seen, now, strict=True)]
            seen = list(now)
            limit = SOON_BEATS if self.leaving.is_set() else LATE_BEATS
            dead = [rank for rank in range(self.world_size) if silent[rank] > limit]
            if told or dead:
                self.loss = self._of_told(json.loads(told)) if told else self._of_dead(dead)
                self.known.set()
        if not self.ended.wait(GRACE_SECONDS):
            if self.loss.tells:
                os.write(2, f"sret: {self.loss}\n".encode())
            os._exit(self.loss.code)

    def tell(self, error: BaseException) -> None:
        """Says what ends this rank, and with it all."""
        lines = str(error).splitlines() or [""]
        known = isinstance(error, SretError)
        reason = {
            "rank": self.rank,
            "message": str(error) if known else f"{type(error).__name__}: {lines[0]}",
            "code": error.code if isinstance(error, SretError) else 1,
            "status": error.status if isinstance(error, SretError) else "failed",
        }
        try:
            self.store.compare_set("reason", "", json.dumps(reason))
        except RuntimeError:
            pass  # nobody is left to be told
        if isinstance(error, SretError):
            error.tells = self.rank == 0
        self.ended.set()

    def explain(self) -> SretError:
        """Why the ranks have lost each other, once that is found out."""
        self.leaving.set()
        self.known.wait(LATE_BEATS * BEAT_SECONDS)
        self.ended.set()
        return self.loss

    def _of_told(self, told: Any) -> SretError:
        error = SretError(
            f"rank {told['rank']}: {told['message']}", told["code"], status=told["status"]
        )
        error.tells = self.rank == 0
        return error

    def _of_dead(self, dead: list[int]) -> SretError:
        names = []
        for rank in dead:
            try:
                who = self.store.get(f"who/{rank}").decode()
            except RuntimeError:
                who = "which had the store"
            names.append(f"rank {rank} of {self.world_size} ({who})")
        error = SretError(
            f"{', '.join(names) or 'a rank'} died; start the same command again to go on from the "
            "last checkpoint",
            AGAIN,
            status="rank_lost",
        )
        error.tells = self.rank == min(set(range(self.world_size)) - set(dead), default=0)
        return error


class Ranks:
    """The processes that train together, as one of them sees them; by itself without arguments.

    `lost` says that they can no longer talk to each other.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.world_size, self.device, self.watch = rank, world_size, device, watch
        self.lost = False

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def gather(self, *values: int) -> list[tuple[int, ...]]:
        """Each rank's numbers, in the order of the ranks."""
        if not self.several:
            return [values]
        own = torch.tensor(values)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own)
        return [tuple(tensor.tolist()) for tensor in found]

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of the ranks."""
        found = [value] * self.world_size
        if self.several:
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any = None) -> Any:
        """The leading rank's value."""
        found = [value]
        if self.several:
            dist.broadcast_object_list(found)
        return found[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def agreeing(self, stop: Stop | None = None) -> Iterator[None]:
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
                    own = lost_loader(error)
                    if own is None:
                        raise
            if not self.several:
                raise own from None
        if self.several:
            for found in self.gather_objects(own):
                if isinstance(found, SretError):
                    found.agreed, found.tells = True, self.leads
                if found is not None:
                    raise found

    @contextmanager
    def ending_all(self) -> Iterator[None]:
        """What one rank raises within and the others do not ends them all, with its reason.

        Raises:
            SretError: another rank ended, or a rank died.
        """
        try:
            yield
        except Exception as error:
            if self.watch is None or getattr(error, "agreed", False):
                raise
            self.lost = True
            if self.is_loss(error):
                raise self.watch.explain() from None
            self.watch.tell(error)
            raise

    def is_loss(self, error: BaseException) -> bool:
        """Whether an error says that another rank is gone."""
        text = str(error).lower()
        return self.several and (
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


def start(device: str) -> Ranks:
    """The ranks that torchrun or Slurm started, once they have all found each other.

    On CUDA each has the GPU of its number on its machine, and tensors go by NCCL; all else goes by
    gloo.

    Raises:
        SretError: the device is not there, or they cannot find each other.
    """
    if started_as()[1] < 2:
        return ALONE
    if ":" in device:
        raise SretError(
            f"--device {device} is one GPU, and each of {started_as()[1]} processes takes its own; "
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
            f"{started_as()[1]} processes need {' and '.join(missing)}, the first one's host and a "
            "free port, to find each other; export them, or unset SLURM_NTASKS to train in one",
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
    watch = Watch(rank, world_size, dist.PrefixStore(f"{prefix}/watch", own))
    ranks = Ranks(rank, world_size, target, watch)
    ranks.gather(0)  # now all beat
    watch.start()
    return ranks
