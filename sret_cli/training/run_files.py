"""The files that a training writes to the directory of its run."""

import time
from collections.abc import Callable
from pathlib import Path

from sret_cli.runtime.errors import CHECKPOINT, SretError
from sret_cli.runtime.files import make_directory, write_json
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import CONFIG_FILE, EMA_DIRECTORY
from sret_cli.training.checkpoint import Checkpoint, CheckpointWriter, newest_checkpoint
from sret_cli.training.config import run_config, write_config
from sret_cli.training.metrics import Metrics, copy_metrics
from sret_cli.training.parallel import full_state
from sret_cli.training.trainer import Trainer
from sret_cli.weights.store import save_weights


class RunFiles:
    """Metrics, checkpoints and weights of one training.

    All ranks call the same methods at the same steps, but only the leader writes.
    """

    def __init__(
        self,
        directory: Path,
        trainer: Trainer,
        options: RunOptions,
        note: Callable[[str], None],
    ) -> None:
        self.directory, self.trainer, self.ranks = directory, trainer, trainer.ranks
        self.options, self.note = options, note
        self.writer: CheckpointWriter | None = None  # the leader's, after `resume`
        self.metrics: Metrics | None = None  # the same
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Loads the newest checkpoint that is not damaged, if there is one, and opens the files.

        Raises:
            SretError: the checkpoints or the metrics are damaged, or of another run.
        """
        trainer = self.trainer
        checkpoint: Checkpoint | None = None
        with self.ranks.raise_together():
            if self.ranks.is_leader:
                checkpoint = self._find_checkpoint()
        checkpoint = self.ranks.broadcast(checkpoint)
        with self.ranks.raise_together():
            changed = [] if checkpoint is None else trainer.load(checkpoint)
            if self.ranks.is_leader:
                if checkpoint is not None and changed:
                    before = ", ".join(changed)
                    self.note(f"{checkpoint.path} was written by {before}: last digits may differ")
                write_config(self.directory, self._config())
                self.metrics = self._open_metrics(checkpoint)
        known = trainer.loader.bad_images
        known += [text for text in trainer.progress.bad_images if text not in known]

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to resume from: the run's own, or that of the run that it continues."""
        continues = self.trainer.run.continues
        own = newest_checkpoint(self.directory, self.note)
        self.writer = CheckpointWriter(self.directory, None if own is None else own.path)
        if own is not None or continues is None:
            return own
        source = self.directory.parent / continues
        earlier = newest_checkpoint(source, self.note)
        if earlier is None:
            raise SretError(
                f"{source} has no checkpoint to resume from (`sret clean` removes them); train "
                f"all {self.trainer.spec.epochs} epochs again, or start with its weights by "
                f"--set train.init={source}",
                CHECKPOINT,
            )
        return earlier

    def _open_metrics(self, checkpoint: Checkpoint | None) -> Metrics:
        p = self.trainer.progress
        if checkpoint is not None and checkpoint.path.parent != self.directory:
            copy_metrics(checkpoint.path.parent, self.directory, p.metrics_bytes)
        return Metrics(
            self.directory,
            position=p.metrics_bytes,
            step=p.step,
            board=self.options.tensorboard,
            note=self.note,
        )

    def _config(self) -> dict[str, object]:
        return run_config(self.trainer.run, self.trainer.loader.class_list.names)

    def write_metrics(self, **values: object) -> None:
        """Writes one line of metrics for the step that was done last."""
        if self.metrics is not None:
            self.metrics.write(self.trainer.progress.step, **values)

    def is_due(self) -> bool:
        """Whether the options ask for a checkpoint now."""
        every, minutes = self.options.checkpoint_every_steps, self.options.checkpoint_minutes
        return (every is not None and self.trainer.progress.step % every == 0) or (
            minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        )

    def save(self, finished: bool = False) -> None:
        """Writes a checkpoint in the background; all ranks have to be at the same step.

        Args:
            finished: whether the run is finished and `save_weights` was called. Then this is the
                only checkpoint that is kept.
        """
        self.saved_at = time.monotonic()
        p, known = self.trainer.progress, self.trainer.loader.bad_images
        if any(count for (count,) in self.ranks.gather(len(known))):
            known[:] = dict.fromkeys(sum(self.ranks.gather_objects(known), []))
        p.bad_images = known
        if self.writer is None or self.metrics is None:
            if self.trainer.shards:
                self.trainer.state()  # the leader gathers the shards of all ranks
            return
        p.metrics_bytes = self.metrics.position
        self.writer.write(
            step=p.step,
            state=self.trainer.state(),
            sync=self.metrics.sync,
            finished=finished,
        )

    def check(self) -> None:
        """Raises the error of the checkpoint in the background, if it has failed by now."""
        if self.writer is not None:
            self.writer.check()

    def wait(self) -> None:
        """Waits, on all ranks, until the last checkpoint is durable."""
        with self.ranks.raise_together():
            if self.writer is not None:
                self.writer.wait()

    def save_weights(self) -> None:
        """Writes `model.safetensors` and, if there are averaged weights, `ema/`."""
        directories = (self.directory, self.directory / EMA_DIRECTORY)
        for model, directory in zip(self.trainer.models(), directories, strict=False):
            state = full_state(model.state_dict())
            if not self.ranks.is_leader:
                continue
            if directory != self.directory:
                make_directory(directory)
                write_json(directory / CONFIG_FILE, self._config())
            save_weights(state, directory)

    def close(self) -> None:
        """Closes the metrics and finishes the checkpoint in the background."""
        if self.metrics is not None:
            self.metrics.close()
        if self.writer is not None:
            self.writer.close()
