"""Detects ranks that died: each rank counts up a number in a store that all ranks read."""

import json
import os
import socket
import threading
from typing import Any

from sret_cli.runtime.errors import SretError, first_line
from sret_cli.runtime.signals import START_AGAIN
from sret_cli.training.rank_error import RankError

BEAT_SECONDS = 1.0
# A rank is dead when its number stays the same for this many of our own beats.
LATE_BEATS = 30
# The same after a connection to another rank broke, which a pause of all ranks cannot cause.
SOON_BEATS = 5
# A GPU call that waits for a dead rank may never return; the process ends after this time.
GRACE_SECONDS = 10.0


class Heartbeat(threading.Thread):
    """A thread that shows that this rank is alive, and finds out which rank is not, and why.

    The main thread may wait on a GPU for a dead rank and cannot be woken; this thread then ends the
    process.
    """

    def __init__(self, rank: int, world_size: int, store: Any) -> None:
        super().__init__(daemon=True, name="watch")
        self.rank, self.world_size, self.store = rank, world_size, store
        self.ended = threading.Event()  # this rank needs no heartbeat any more
        self.loss_known = threading.Event()  # `loss` says why the ranks have to end
        self.disconnected = threading.Event()  # a connection to another rank broke
        self.loss = self._error_of_dead_ranks([])
        self.store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self.store.set(f"beat/{rank}", "0")

    def run(self) -> None:
        """Beats until this rank ends or another rank is lost."""
        beats, seen, silent = 0, [b""] * self.world_size, [0] * self.world_size
        while not self.loss_known.is_set():
            if self.ended.wait(BEAT_SECONDS):
                return
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                now = self.store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])
                reason = self.store.get("reason") if self.store.check(["reason"]) else b""
            except RuntimeError:  # the first rank, or its torchrun, holds the store and is gone
                now, reason = [b"", *seen[1:]], b""
                silent[0] = LATE_BEATS
            silent = [n + 1 if a == b else 0 for n, a, b in zip(silent, seen, now, strict=True)]
            seen = list(now)
            limit = SOON_BEATS if self.disconnected.is_set() else LATE_BEATS
            dead = [rank for rank in range(self.world_size) if silent[rank] > limit]
            if reason or dead:
                self.loss = (
                    self._error_of_failed_rank(json.loads(reason))
                    if reason
                    else self._error_of_dead_ranks(dead)
                )
                self.loss_known.set()
        if not self.ended.wait(GRACE_SECONDS):
            if self.loss.reported_here:
                os.write(2, f"sret: {self.loss}\n".encode())
            os._exit(self.loss.code)

    def publish_error(self, error: BaseException) -> None:
        """Writes to the store which error ends this rank; the other ranks then end with it too."""
        known = isinstance(error, SretError)
        reason = {
            "rank": self.rank,
            "message": str(error) if known else f"{type(error).__name__}: {first_line(error)}",
            "code": error.code if isinstance(error, SretError) else 1,
            "status": error.status if isinstance(error, SretError) else "failed",
        }
        try:
            self.store.compare_set("reason", "", json.dumps(reason))
        except RuntimeError:
            pass  # the store is gone, and with it the other ranks
        self.ended.set()

    def wait_for_loss(self) -> RankError:
        """The reason why the ranks lost each other; waits until it is known."""
        self.disconnected.set()
        self.loss_known.wait(LATE_BEATS * BEAT_SECONDS)
        self.ended.set()
        return self.loss

    def _error_of_failed_rank(self, reason: Any) -> RankError:
        error = SretError(
            f"rank {reason['rank']}: {reason['message']}", reason["code"], status=reason["status"]
        )
        return RankError(error, reported_here=self.rank == 0)

    def _error_of_dead_ranks(self, dead: list[int]) -> RankError:
        names = []
        for rank in dead:
            try:
                who = self.store.get(f"who/{rank}").decode()
            except RuntimeError:
                who = "which held the store"
            names.append(f"rank {rank} of {self.world_size} ({who})")
        error = SretError(
            f"{', '.join(names) or 'a rank'} died; start the same command again to resume from "
            "the last checkpoint",
            START_AGAIN,
            status="rank_lost",
        )
        first_alive = min(set(range(self.world_size)) - set(dead), default=0)
        return RankError(error, reported_here=self.rank == first_alive)
