"""What a training reports when a loss or a gradient is not finite."""

from copy import copy
from pathlib import Path

from sret_cli.data.loaders import Batches, Loader
from sret_cli.runtime.errors import SOME_FAILED, SretError
from sret_cli.runtime.files import write_json
from sret_cli.spec.run import Row
from sret_cli.training.state import TrainingProgress

DIVERGED_FILE = "diverged.json"


class Diverged(SretError):
    """A loss or a gradient is not finite; every rank finds this at the same step.

    Args:
        what: the quantity and its value, such as "loss is nan".
        step: the number of the step, from 1.
        epoch: the number of the epoch, from 1.
        lr: the learning rate of the step.
    """

    def __init__(self, what: str, step: int, epoch: int, lr: float) -> None:
        super().__init__(
            f"diverged: the {what} at step {step} (epoch {epoch}, lr {lr:.2g}); use a smaller "
            "train.lr or clip_grad",
            SOME_FAILED,
            status="diverged",
        )
        self.lr = lr


def write_divergence(
    directory: Path, error: Diverged, progress: TrainingProgress, loader: Loader
) -> None:
    """Writes `diverged.json`: the error, where the training was, and the images of the step.

    A loss that evaluation found has no images.
    """
    in_epoch = progress.batch < len(loader)
    report: Row = {
        "error": str(error),
        "steps_done": progress.step,
        "epoch": progress.epoch + 1,
        "lr": error.lr,
        "batch_indices": next_batch_indices(loader, progress) if in_epoch else [],
    }
    write_json(directory / DIVERGED_FILE, report)


def next_batch_indices(loader: Loader, progress: TrainingProgress) -> list[int]:
    """The indices of the images in the next batch, of all ranks; empty for a stream."""
    if not isinstance(loader.batches, Batches):
        return []
    batches = copy(loader.batches)
    batches.rank, batches.world_size = 0, 1
    batches.epoch, batches.start = progress.epoch, progress.batch
    return [index for _, index, _ in next(iter(batches))]
