"""What a training reports when a loss or a gradient is not finite."""

from pathlib import Path

from sret_cli.data.prepare import Loader
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
    batch_indices = loader.batches.batch_indices(progress.epoch, progress.batch) if in_epoch else []
    report: Row = {
        "error": str(error),
        "steps_done": progress.step,
        "epoch": progress.epoch + 1,
        "lr": error.lr,
        "batch_indices": batch_indices,
    }
    write_json(directory / DIVERGED_FILE, report)
