"""How several processes that train together report one error, and report it once."""

import time

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.processes import is_leader

LEADER_SECONDS = 5.0


class RankError(SretError):
    """An error that ends all ranks; one of them reports it.

    Attributes:
        original: the error as a rank raised it; this one has its message, code and status.
        reported_here: whether this rank is the one that reports it.
    """

    def __init__(self, original: SretError, reported_here: bool) -> None:
        super().__init__(str(original), original.code, original.table, original.status)
        self.original = original
        self.reported_here = reported_here


def original_error(error: SretError) -> SretError:
    """The error as a rank raised it: of any class but `RankError`."""
    return error.original if isinstance(error, RankError) else error


def wait_until_reported(error: BaseException) -> bool:
    """Whether this process has to report an error that ends it; may take a few seconds.

    A `RankError` says which rank reports it. Any other error came before the ranks found each
    other, such as a wrong flag, and most of these come up in every process. Then the leader reports
    it, and torchrun or Slurm ends the other processes because the leader ended. So a process that
    is not the leader first waits for its own end for `LEADER_SECONDS`. If it is still alive after
    that, the leader did not fail, and the process reports the error itself.
    """
    if isinstance(error, RankError):
        return error.reported_here
    if not is_leader():
        time.sleep(LEADER_SECONDS)
    return True
