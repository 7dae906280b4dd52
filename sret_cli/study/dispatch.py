"""How trainings are done, and the processes that do them together: one leads, the others follow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sret_cli.runtime.errors import USAGE, SretError, print_note
from sret_cli.runtime.processes import rank_and_world_size
from sret_cli.runtime.progress import OnStep
from sret_cli.spec.run import Row, Run

if TYPE_CHECKING:
    from sret_cli.training.ranks import Ranks


@dataclass(frozen=True)
class RunOptions:
    """How and where runs are done, which does not change what they do.

    `measure_batch_size` is None where nothing is to be timed; `compiles` is as in `compile_model`,
    for what is timed; `full_trace` counts every pass; `gpu_memory` is a budget in bytes.
    Checkpoints are written at the end of every epoch, so many minutes after the last one (0: not
    for that), and every so many steps.
    `shard` leaves each of several processes its share of the weights.
    """

    device: str = "auto"
    workers: int | None = None
    measure_batch_size: int | None = None
    precision: str = "fp32"
    compiles: str = "off"
    full_trace: bool = False
    gpu_memory: int | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    shard: bool = False


class Team:
    """The processes that torchrun or Slurm started, or this one alone, at the runs of a study.

    Raises:
        SretError: they cannot find each other, or weights are to be sharded and there is but one.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.ranks: Ranks | None = None  # starting them takes torch, which one process may not need
        if rank_and_world_size()[1] > 1:
            from sret_cli.training.ranks import start_ranks

            self.ranks = start_ranks(options.device)
        elif options.shard:
            raise SretError(
                "--shard shares the weights out among several processes; start them by torchrun "
                "--nproc-per-node N -m sret_cli train, or leave it out",
                USAGE,
            )

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.ranks is None or self.ranks.is_leader

    @property
    def lost(self) -> bool:
        """Whether the processes can no longer talk to each other."""
        return self.ranks is not None and self.ranks.lost

    def train(
        self,
        run: Run,
        directory: Path,
        on_step: OnStep = lambda done, total, text: None,
        note: Callable[[str], None] = print_note,
    ) -> Row:
        """Trains a run, with all processes; called by the leading one, and by those that follow."""
        from sret_cli.training.ranks import ALONE
        from sret_cli.training.session import Saving, train

        options, ranks = self.options, self.ranks or ALONE
        if ranks.is_leader:
            ranks.broadcast((run, directory))
        return train(
            run,
            directory,
            options.device,
            options.workers,
            on_step=on_step,
            note=note,
            saving=Saving(options.checkpoint_every_steps, options.checkpoint_minutes or None),
            tensorboard=options.tensorboard,
            gpu_memory=options.gpu_memory,
            ranks=ranks,
            shards=options.shard,
            known=True,
        )

    def follow(self) -> NoReturn:
        """Takes part in the trainings that the leading process begins, until it ends."""
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
        """Lets those that follow end, by the same exit code, when the leading process is done."""
        code = 0
        try:
            yield
        except SretError as error:
            code = error.code
            raise
        except Exception:
            code = 1
            raise
        except BaseException:  # signals come to all of them
            code = -1
            raise
        finally:
            if self.ranks is not None and not self.ranks.lost and code >= 0:
                self.ranks.broadcast(code)
                self.ranks.close()
