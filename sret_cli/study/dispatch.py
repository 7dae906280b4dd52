"""Trainings by several processes: rank 0 leads, and the others take part in what it starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.runtime.processes import rank_and_world_size
from sret_cli.runtime.progress import Progress
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Row, Run

if TYPE_CHECKING:
    from sret_cli.training.ranks import Ranks


class Team:
    """The processes that torchrun or Slurm started, or this process alone, at the runs of a study.

    Raises:
        SretError: the processes cannot connect, or `shard` is set for a single process.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.ranks: Ranks | None = (
            None  # None for a single process, which then does not import torch here
        )
        if rank_and_world_size()[1] > 1:
            from sret_cli.training.ranks import start_ranks

            self.ranks = start_ranks(options.device)
        elif options.shard:
            raise SretError(
                "--shard needs several processes; start them by torchrun --nproc-per-node N -m "
                "sret_cli train, or leave it out",
                USAGE,
            )

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and prints."""
        return self.ranks is None or self.ranks.is_leader

    @property
    def lost(self) -> bool:
        """Whether the processes can no longer communicate."""
        return self.ranks is not None and self.ranks.lost

    def train(
        self,
        run: Run,
        directory: Path,
        progress: Progress = Progress(),
    ) -> Row:
        """Trains a run with all processes, each of which calls this."""
        from sret_cli.training.ranks import ALONE
        from sret_cli.training.session import train

        ranks = self.ranks or ALONE
        if ranks.is_leader:
            ranks.broadcast((run, directory))
        return train(
            run,
            directory,
            options=self.options,
            progress=progress,
            ranks=ranks,
            known=True,
        )

    def follow(self) -> NoReturn:
        """Takes part in the trainings that rank 0 starts, until rank 0 ends; then exits."""
        assert self.ranks is not None
        while True:
            with self.ranks.end_together():
                wanted = self.ranks.broadcast()
            if isinstance(wanted, int):
                self.ranks.close()
                raise SystemExit(wanted)
            try:
                self.train(*wanted)
            except SretError:
                if self.ranks.lost:
                    raise

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Ends the other processes with the exit code of rank 0 when the context ends."""
        code = 0
        try:
            yield
        except SretError as error:
            code = error.code
            raise
        except Exception:
            code = 1
            raise
        except BaseException:  # a signal reaches every process
            code = -1
            raise
        finally:
            if self.ranks is not None and not self.ranks.lost and code >= 0:
                self.ranks.broadcast(code)
                self.ranks.close()
