"""Whether the other ranks are alive: each rank's heart beats in a store that all can read."""

import json
import os
import socket
import threading
from typing import Any

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.signals import START_AGAIN

BEAT_SECONDS = 1.0


LATE_BEATS = 30  # a rank that has been silent for so many of our own beats is dead,


SOON_BEATS = 5  # and for so few where a connection has broken: of pauses of all ranks it is none


GRACE_SECONDS = 10.0  # for a thread that waits for a dead rank, where nothing tells it


class Heartbeat(threading.Thread):
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
            if self.loss.reported_here:
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
            error.reported_here = self.rank == 0
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
        error.reported_here = self.rank == 0
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
            START_AGAIN,
            status="rank_lost",
        )
        error.reported_here = self.rank == min(set(range(self.world_size)) - set(dead), default=0)
        return error
