"""The training of one run: its epochs, and the preparation before them."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from sret_cli.data.fingerprint import Fingerprint, write_fingerprints
from sret_cli.data.loader import Loader
from sret_cli.data.prepare import load_data
from sret_cli.runtime.device import (
    choose_device,
    device_name,
    peak_gigabytes,
    use_deterministic_kernels,
)
from sret_cli.runtime.errors import SretError, notes_shown_by, show_note_once
from sret_cli.runtime.lock import locked_directory
from sret_cli.runtime.progress import Progress
from sret_cli.runtime.signals import Interrupted, Stop, catching_signals
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Row, Run
from sret_cli.training.checkpoint import trained_classes
from sret_cli.training.config import run_config, write_config
from sret_cli.training.divergence import Diverged
from sret_cli.training.evaluate import Evaluation, default_workers, evaluate
from sret_cli.training.garbage import rare_garbage_collection
from sret_cli.training.identify import Identifier, refuse_others
from sret_cli.training.interruption import saving_on_interruption
from sret_cli.training.notes import training_notes
from sret_cli.training.out_of_memory import explained_out_of_memory
from sret_cli.training.parallel import gathered_weights
from sret_cli.training.ranks import ALONE, Ranks, collected_failures
from sret_cli.training.run_files import RunFiles
from sret_cli.training.trainer import Trainer


def train(
    run: Run,
    directory: Path | None = None,
    options: RunOptions = RunOptions(),
    progress: Progress = Progress(),
    ranks: Ranks = ALONE,
    known: bool = False,
) -> Row:
    """Trains a run and returns its measurements; resumes from its newest checkpoint if it has one.

    Writes `config.json`, `metrics.jsonl`, checkpoints and, at the end, `model.safetensors` to the
    run's directory, and the averaged weights to `ema/` in it. The same seed on the same machine
    gives bitwise the same losses, also after an interruption: on a CPU always, on CUDA as far as
    torch has deterministic kernels.

    Args:
        run: a run with a [train] table.
        directory: where to write; `runs/<study>/<run_id>` if None.
        options: device, loader processes and checkpoints.
        progress: receives the steps that are done, and notes for the user.
        ranks: the processes that train together. All of them have to call this with the same
            arguments; only the leader writes files.
        known: whether to use the lists of images that this process made before. A study does, so
            that it lists the images once for all its runs.

    Raises:
        SretError: data or device do not exist, the loss is not finite, memory or disk are full,
            another process trains the run, the directory has another run, or a rank died.
        KeyboardInterrupt, SystemExit: a signal came; the state is saved.

    Examples:
        >>> from pathlib import Path
        >>> from sret_cli import PRESETS, TrainSpec, train
        >>> from sret_cli.spec.run import Run
        >>> spec = TrainSpec(dataset="digits", epochs=1, warmup_epochs=0, batch_size=240)
        >>> run = Run("notebook", "nano", PRESETS["nano"].with_values(recursions=1), spec)
        >>> row = train(run, Path("runs/notebook/nano"))
        >>> row["epochs_trained"], row["test_images"]
        (1, 360)
    """
    if run.train is None:
        raise SretError("this run has no [train] table; add one, or use `sret profile`")
    directory = directory or Identifier().identify(run).directory(Path("runs"))
    with notes_shown_by(progress.note), ExitStack() as stack, ranks.end_together():
        trainer, test_loader, fingerprints = _prepare(
            run,
            directory=directory,
            options=options,
            ranks=ranks,
            known=known,
        )
        with ranks.raise_together():
            if ranks.is_leader:
                stack.enter_context(locked_directory(directory))
                write_config(directory, run_config(trainer.run))
                write_fingerprints(directory, fingerprints)
        trainer.average_gradients()
        stop = stack.enter_context(catching_signals())
        stop.gives_up = not ranks.is_distributed
        stack.enter_context(rare_garbage_collection())
        files = RunFiles(directory, trainer=trainer, options=options, note=progress.note)
        stack.callback(files.close)
        session = Session(
            trainer=trainer,
            test_loader=test_loader,
            files=files,
            stop=stop,
            progress=progress,
        )
        with explained_out_of_memory(trainer), saving_on_interruption(trainer, files, stop):
            files.resume()
            for text in training_notes(trainer.spec, trainer.loader):
                show_note_once(text)
            return session.run()


def _prepare(
    run: Run, directory: Path, options: RunOptions, ranks: Ranks, known: bool
) -> tuple[Trainer, Loader, dict[str, Fingerprint]]:
    """The trainer, the test images, and the fingerprints of all images; writes nothing.

    Raises:
        SretError: data or device do not exist, or the data are not those that the run began with.
    """
    assert run.train is not None
    device = ranks.device or choose_device(options.device)
    use_deterministic_kernels(device)
    if run.train.recipe == "finetune" and run.train.init is None:
        show_note_once(
            "recipe finetune without train.init trains from scratch, but its learning rate "
            f"({run.train.lr:g}) is for trained weights"
        )
    with ranks.raise_together():
        order = trained_classes(directory, run.continues) if ranks.is_leader else None
    order = ranks.broadcast(order)
    with ranks.raise_together():
        training_loader, test_loader = load_data(
            run.train,
            run.model,
            workers=default_workers(run.train) if options.workers is None else options.workers,
            rank=ranks.rank,
            world_size=ranks.world_size,
            order=order,
            known=known,
        )
        run, fingerprints = refuse_others(
            run, directory, [training_loader.source, test_loader.source]
        )
        trainer = Trainer(
            run,
            loader=training_loader,
            device=device,
            gpu_memory=options.gpu_memory,
            ranks=ranks,
            shards=options.shard,
        )
    return trainer, test_loader, fingerprints


class Session:
    """The epochs of a training, from where its trainer is.

    Raises:
        SretError: as `train`.
        Interrupted: a signal came.
    """

    def __init__(
        self,
        trainer: Trainer,
        test_loader: Loader,
        files: RunFiles,
        stop: Stop,
        progress: Progress,
    ) -> None:
        self.trainer, self.test_loader, self.files = trainer, test_loader, files
        self.stop, self.progress, self.ranks = stop, progress, trainer.ranks

    def run(self) -> Row:
        """Trains the epochs that are left and writes the weights; returns the measurements."""
        epochs, p = self.trainer.spec.epochs, self.trainer.progress
        while p.epoch < epochs:
            self._train_epoch()
            self._evaluate_epoch()
            if p.epoch < epochs:
                self.files.save()
        self.files.save_weights()
        self.files.save(finished=True)
        self.files.wait()
        return self._row()

    def _train_epoch(self) -> None:
        trainer, p = self.trainer, self.trainer.progress
        steps = trainer.spec.epochs * len(trainer.loader)
        trainer.module.train()
        started, seconds_before = time.perf_counter(), p.seconds
        for images, target, counts in self._batches():
            lr = trainer.lr
            loss = trainer.step(images, target, counts)
            self.files.write_metrics(step=p.step, epoch=p.epoch + 1, loss=loss, lr=lr)
            p.seconds = seconds_before + time.perf_counter() - started
            trainer.can_be_saved = True
            self.progress.on_step(p.step, steps, describe_step(trainer, loss, lr))
            self.files.check()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
        """The batches that are left of an epoch: images, targets, number of images of each rank.

        Before each batch the ranks agree whether to save, to stop, or to raise an error.
        """
        p, steps = self.trainer.progress, len(self.trainer.loader)
        batches = iter(self.trainer.loader.epoch(p.epoch, p.batch) if p.batch < steps else ())
        while True:
            batch = None
            with collected_failures(self.stop) as failures:
                batch = next(batches, None)
            errors = [failure for failure in failures if isinstance(failure, SretError)]
            gathered = self.ranks.gather(
                0 if batch is None else len(batch[0]),
                self.stop.code or 0,
                self.files.is_due(),
                bool(errors),
            )
            counts, codes, due, failed = zip(*gathered, strict=True)
            if due[0] and 0 < p.batch < steps:
                self.files.save()
            if any(failed):
                with self.ranks.raise_together():
                    for error in errors:
                        raise error
            if any(codes):
                raise Interrupted(max(codes))
            if batch is None:
                return
            images, target = batch
            yield images, target, counts

    def _evaluate_epoch(self) -> None:
        """Evaluates the model and its averages, and counts the epoch as done."""
        trainer, p = self.trainer, self.trainer.progress
        if trainer.spec.recursions_range is not None:
            for model in trainer.models():
                model.set_recursions(None)
        evaluation = self._evaluate(trainer.module)
        results: Row = {"final_loss": p.loss_sum / max(p.batch, 1), **evaluation.row()}
        if trainer.ema is not None:
            averaged = self._evaluate(trainer.ema.module).row()
            results |= {f"ema_{k}": averaged[k] for k in averaged if k != "test_images"}
        line = {("train_loss" if k == "final_loss" else k): v for k, v in results.items()}
        self.files.write_metrics(epoch=p.epoch + 1, **line)
        best = p.results.get("best_top1_percent", 0.0)
        p.results = {**results, "best_top1_percent": max(best, evaluation.top1_percent)}
        p.epoch, p.batch, p.loss_sum = p.epoch + 1, 0, 0.0

    def _evaluate(self, model: torch.nn.Module) -> Evaluation:
        trainer, p = self.trainer, self.trainer.progress
        with gathered_weights(model):
            evaluation = evaluate(
                model,
                loader=self.test_loader,
                device=trainer.device,
                precision=trainer.spec.precision,
                ranks=self.ranks,
                stop=self.stop,
            )
        if not math.isfinite(evaluation.test_loss):
            raise Diverged(
                f"test loss is {evaluation.test_loss}",
                step=p.step,
                epoch=p.epoch + 1,
                lr=trainer.last_lr,
            )
        return evaluation

    def _row(self) -> Row:
        trainer, p = self.trainer, self.trainer.progress
        bad = {*trainer.loader.bad_images, *self.test_loader.bad_images}
        bad_images = len(set().union(*self.ranks.gather_objects(bad)))
        with self.ranks.raise_together():
            self.stop.check()
        return {
            "bad_images": bad_images,
            "epochs_trained": trainer.spec.epochs,
            "images_seen": p.images,
            "train_seconds": p.seconds,
            "images_per_second": p.images / p.seconds if p.seconds else None,
            **p.results,
            "world_size": self.ranks.world_size,
            "device_name": device_name(trainer.device),
            "torch_version": torch.__version__,
        }


def describe_step(trainer: Trainer, loss: float, lr: float) -> str:
    """The text next to a progress bar after a step, with the accuracy of the last evaluation."""
    p, top1 = trainer.progress, trainer.progress.results.get("top1_percent")
    accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
    return (
        f"epoch {p.epoch + 1}/{trainer.spec.epochs}{accuracy}, loss {loss:.3f}, lr {lr:.2g}, "
        f"{p.images / p.seconds:.0f} images/s, {peak_gigabytes(trainer.device)}"
    )
