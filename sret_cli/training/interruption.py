"""The end of a training by a signal or by an error between two steps: its state is saved first."""

from collections.abc import Iterator
from contextlib import contextmanager

from sret_cli.runtime.errors import DATA, SOME_FAILED, LoaderLost, SretError
from sret_cli.runtime.signals import Interrupted, Stop, exit_as_signalled
from sret_cli.training.divergence import Diverged, write_divergence
from sret_cli.training.rank_error import RankError, original_error
from sret_cli.training.ranks import Ranks
from sret_cli.training.run_files import RunFiles
from sret_cli.training.trainer import Trainer


@contextmanager
def saving_on_interruption(trainer: Trainer, files: RunFiles, stop: Stop) -> Iterator[None]:
    """Saves the state of a training that is interrupted or fails within, if it can be resumed.

    That is so after a signal, and after the error of an image, a loss or a loader process. A
    training that diverged also leaves `diverged.json`.

    Raises:
        KeyboardInterrupt, SystemExit: a signal came.
        SretError, RuntimeError: the error within.
    """
    ranks = trainer.ranks
    try:
        yield
        return
    except Interrupted as interrupted:
        reason: SretError | Interrupted = interrupted
    except Diverged as diverged:
        if ranks.is_leader:
            write_divergence(
                files.directory, error=diverged, progress=trainer.progress, loader=trainer.loader
            )
        reason = ranks.raised_by_all(diverged)
    except SretError as error:
        if not _is_between_steps(error, ranks):
            raise
        reason = error
    except RuntimeError as error:
        if ranks.is_distributed or not stop.explains(error):
            raise
        assert stop.code is not None
        reason = Interrupted(stop.code)  # the signal also ended the loader's processes
    stop.be_patient()
    if trainer.can_be_saved:
        files.save()
        files.wait()
    if isinstance(reason, Interrupted):
        exit_as_signalled(reason.code)
    raise reason from None


def _is_between_steps(error: SretError, ranks: Ranks) -> bool:
    """Whether all ranks raise an error of an image, a loss or a loader process after one step."""
    if ranks.is_distributed and not isinstance(error, RankError):
        return False
    original = original_error(error)
    return original.code in (DATA, SOME_FAILED) or isinstance(original, LoaderLost)
