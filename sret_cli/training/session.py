"""Training of one run: its epochs, and all that keeps them from being lost."""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sret_cli.data.fingerprint import write_fingerprints
from sret_cli.data.loader import Loader
from sret_cli.data.loaders import load_data
from sret_cli.runtime.device import choose_device, device_name, use_deterministic_kernels
from sret_cli.runtime.errors import (
    CHECKPOINT,
    DATA,
    SOME_FAILED,
    LoaderLost,
    SretError,
    as_loader_lost,
    as_out_of_memory,
    notes_shown_by,
    show_note_once,
)
from sret_cli.runtime.files import check_not_shorter, make_directory, write_atomically, write_json
from sret_cli.runtime.lock import locked_directory
from sret_cli.runtime.progress import Progress
from sret_cli.runtime.signals import Interrupted, Stop, catching_signals, exit_as_signalled
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import CONFIG_FILE, EMA_DIRECTORY, Row, Run
from sret_cli.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    newest_checkpoint,
    trained_classes,
)
from sret_cli.training.config import run_config, write_config
from sret_cli.training.evaluate import Evaluation, default_workers, evaluate
from sret_cli.training.identify import Identifier, refuse_others
from sret_cli.training.metrics import METRICS_FILE, Metrics
from sret_cli.training.notes import training_notes
from sret_cli.training.out_of_memory import describe_step, out_of_memory_error
from sret_cli.training.parallel import full_state, gathered_weights
from sret_cli.training.ranks import ALONE, Ranks
from sret_cli.training.trainer import Diverged, Trainer
from sret_cli.weights.store import save_weights

DIVERGED_FILE = "diverged.json"


def train(
    run: Run,
    directory: Path | None = None,
    options: RunOptions = RunOptions(),
    progress: Progress = Progress(),
    ranks: Ranks = ALONE,
    known: bool = False,
) -> Row:
    """Trains a run and returns its measurements; goes on from its newest checkpoint, if it has one.

    Writes `config.json`, `metrics.jsonl`, checkpoints and, at the end, `model.safetensors` to the
    run's directory (`runs/<study>/<run_id>`), and the averaged weights to `ema/` in it. The same
    seed on the same machine gives bitwise the same losses, also where it was interrupted: on a CPU
    always, on CUDA as far as torch has deterministic kernels. Of several `ranks`,
    which all have to call this, the first one alone writes files. With `known` images
    are taken as this process has listed them before, which a study does once for all its runs.

    Raises:
        SretError: data or device are not there, the loss is not finite, memory or disk are full,
            another process trains the run, what is in the directory is of another run, or a rank
            died.
        KeyboardInterrupt, SystemExit: a signal came; the state is saved.
    """
    if run.train is None:
        raise SretError("this run has no [train] table; add one, or use `sret profile`")
    target_device = ranks.device or choose_device(options.device)
    directory = directory or Identifier().identify(run).directory(Path("runs"))
    use_deterministic_kernels(target_device)
    workers = default_workers(run.train) if options.workers is None else options.workers
    with notes_shown_by(progress.note), ExitStack() as stack, ranks.end_together():
        if run.train.recipe == "finetune" and run.train.init is None:
            show_note_once(
                "recipe finetune without train.init: this trains from scratch, at a learning rate "
                f"({run.train.lr:g}) for weights that are trained already"
            )
        with ranks.raise_together():
            order = trained_classes(directory, run.continues) if ranks.is_leader else None
        order = ranks.broadcast(order)
        with ranks.raise_together():
            where = workers, ranks.rank, ranks.world_size
            loaders = load_data(run.train, run.model, *where, order, known)
            run, found = refuse_others(run, directory, [loader.source for loader in loaders])
            trainer = Trainer(
                run, loaders[0], target_device, options.gpu_memory, ranks, options.shard
            )
            if ranks.is_leader:
                stack.enter_context(locked_directory(directory))
                write_config(directory, run_config(run))
                write_fingerprints(directory, found)
        trainer.join()
        stop = stack.enter_context(catching_signals())
        stop.gives_up = not ranks.is_distributed
        stack.enter_context(rare_garbage_collection())
        session = Session(trainer, loaders[1], directory, options, stop, progress)
        stack.callback(session.close)
        try:
            session.resume()
            for text in training_notes(trainer.spec, loaders[0]):
                show_note_once(text)
            return session.run()
        except Interrupted as asked:
            exit_as_signalled(asked.code)
        except (RuntimeError, MemoryError) as error:
            if as_out_of_memory(error) is None or ranks.is_lost_rank(error):
                raise
            raise out_of_memory_error(error, trainer) from None


class Session:
    """A trainer at work in a run's directory: resumes, goes through the epochs, saves.

    Raises:
        SretError: as `train`.
    """

    def __init__(
        self,
        trainer: Trainer,
        test_loader: Loader,
        directory: Path,
        options: RunOptions,
        stop: Stop,
        progress: Progress,
    ) -> None:
        self.trainer, self.test_loader, self.directory = trainer, test_loader, directory
        self.options, self.stop, self.progress = options, stop, progress
        self.ranks = trainer.ranks
        self.writer: CheckpointWriter | None = None  # these are the leading rank's
        self.metrics: Metrics | None = None
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Goes on from the newest checkpoint that is sound, where there is one."""
        found: Checkpoint | None = None
        with self.ranks.raise_together():
            if self.ranks.is_leader:
                found = self._find()
        found = self.ranks.broadcast(found)
        with self.ranks.raise_together():
            changed = [] if found is None else self.trainer.load(found)
            if self.ranks.is_leader:
                if found is not None and changed:
                    was = ", ".join(changed)
                    self.progress.note(f"{found.path} was written by {was}: last digits may differ")
                self._open_metrics(found)
                config = run_config(self.trainer.run, self.trainer.loader.class_list.names)
                write_config(self.directory, config)
        bad, known = self.trainer.progress.bad_images, self.trainer.loader.bad_images
        known += [text for text in bad if text not in known]

    def _find(self) -> Checkpoint | None:
        continues = self.trainer.run.continues
        found = newest_checkpoint(self.directory, self.progress.note)
        self.writer = CheckpointWriter(self.directory, None if found is None else found.path)
        if found is None and continues is not None:
            source = self.directory.parent / continues
            found = newest_checkpoint(source, self.progress.note)
            if found is None:
                raise SretError(
                    f"{source} has no checkpoint to go on from (`sret clean` removes them); train "
                    f"all {self.trainer.spec.epochs} epochs anew, or begin with its weights by "
                    f"--set train.init={source}",
                    CHECKPOINT,
                )
        return found

    def _open_metrics(self, found: Checkpoint | None) -> None:
        p = self.trainer.progress
        if found is not None and found.path.parent != self.directory:
            source = found.path.parent / METRICS_FILE
            check_not_shorter(source, p.metrics_bytes)
            lines = source.read_bytes() if p.metrics_bytes else b""
            write_atomically(self.directory / METRICS_FILE, lines[: p.metrics_bytes])
        board, note = self.options.tensorboard, self.progress.note
        self.metrics = Metrics(self.directory, p.metrics_bytes, p.step, board, note)

    def close(self) -> None:
        """Ends what writes, when it has written what is under way."""
        if self.metrics is not None:
            self.metrics.__exit__()
        if self.writer is not None:
            self.writer.close()

    def run(self) -> Row:
        """All epochs that are left, then the weights; returns the run's measurements."""
        trainer, spec, p = self.trainer, self.trainer.spec, self.trainer.progress
        try:
            while p.epoch < spec.epochs:
                self._train_epoch()
                self._evaluate_epoch()
                if p.epoch < spec.epochs:
                    self._save()
            self._save_weights()
            self._save(finished=True)
            self._wait()
        except (SretError, Interrupted, RuntimeError) as error:
            if isinstance(error, SretError) and not self._is_between_steps(error):
                raise
            if isinstance(error, RuntimeError):
                if self.ranks.is_distributed or not self.stop.explains(error):
                    raise
                assert self.stop.code is not None
                error = Interrupted(self.stop.code)  # the signal ended the loader's processes, too
            self.stop.be_patient()
            if trainer.whole:
                self._save()
                self._wait()
            raise error from None
        bad = {*trainer.loader.bad_images, *self.test_loader.bad_images}
        bad_images = len(set().union(*self.ranks.gather_objects(bad)))
        with self.ranks.raise_together():
            self.stop.check()
        return {
            "bad_images": bad_images,
            "epochs_trained": spec.epochs,
            "train_seconds": p.seconds,
            "images_per_second": p.images / p.seconds if p.seconds else None,
            **p.results,
            "world_size": self.ranks.world_size,
            "device_name": device_name(trainer.device),
            "torch_version": torch.__version__,
        }

    def _is_between_steps(self, error: SretError) -> bool:
        """Whether an error, of a loss, an image or a loader, leaves a state that all can save."""
        agreed = error.on_all_ranks or not self.ranks.is_distributed
        return agreed and (error.code in (DATA, SOME_FAILED) or isinstance(error, LoaderLost))

    def _save_weights(self) -> None:
        trainer = self.trainer
        directories = (self.directory, self.directory / EMA_DIRECTORY)
        for model, directory in zip(trainer.models(), directories, strict=False):
            state = full_state(model.state_dict())
            if not self.ranks.is_leader:
                continue
            if model is not trainer.module:
                make_directory(directory)
                write_json(
                    directory / CONFIG_FILE,
                    run_config(trainer.run, trainer.loader.class_list.names),
                )
            save_weights(state, directory)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
        """The batches that are left of an epoch, with the images that each rank has of one.

        Before each, what has to be done between two steps is done, and ranks agree on it.
        """
        trainer, p = self.trainer, self.trainer.progress
        steps = len(trainer.loader)
        batches = iter(trainer.loader.epoch(p.epoch, p.batch) if p.batch < steps else ())
        while True:
            batch, failure = None, None
            try:
                batch = next(batches, None)
            except SretError as error:
                failure = error
            except RuntimeError as error:
                if not self.stop.explains(error):
                    failure = as_loader_lost(error)
                    if failure is None:
                        raise
            counts, codes, due, failures = zip(
                *self.ranks.gather(
                    *(0 if batch is None else len(batch[0]), self.stop.code or 0),
                    *(self._is_due(), failure is not None),
                ),
                strict=True,
            )
            if due[0] and 0 < p.batch < steps:
                self._save()
            if any(failures):
                with self.ranks.raise_together():
                    if failure is not None:
                        raise failure
            if any(codes):
                raise Interrupted(max(codes))
            if batch is None:
                return
            yield *batch, counts

    def _train_epoch(self) -> None:
        trainer, p = self.trainer, self.trainer.progress
        trainer.module.train()
        before, seconds = time.perf_counter(), p.seconds
        for images, target, counts in self._batches():
            lr = trainer.lr
            try:
                loss = trainer.step(images, target, counts)
            except Diverged as error:
                self._report(error, lr)
                raise
            if self.metrics is not None:
                self.metrics.write(p.step, step=p.step, epoch=p.epoch + 1, loss=loss, lr=lr)
            p.seconds = seconds + time.perf_counter() - before
            trainer.whole = True
            steps = trainer.spec.epochs * len(trainer.loader)
            self.progress.on_step(p.step, steps, describe_step(trainer, loss, lr))
            if self.writer is not None:
                self.writer.check()

    def _evaluate_epoch(self) -> None:
        """Evaluates, and moves on to the next epoch."""
        trainer, spec, p = self.trainer, self.trainer.spec, self.trainer.progress
        if spec.recursions_range is not None:
            for model in trainer.models():
                model.set_recursions(None)
        found = self._evaluate(trainer.module)
        results: Row = {"final_loss": p.loss_sum / max(p.batch, 1), **found.row()}
        if trainer.ema is not None:
            averaged = self._evaluate(trainer.ema.module).row()
            results |= {f"ema_{k}": averaged[k] for k in averaged if k != "test_images"}
        line = {("train_loss" if k == "final_loss" else k): v for k, v in results.items()}
        if self.metrics is not None:
            self.metrics.write(p.step, epoch=p.epoch + 1, **line)
        best = p.results.get("best_top1_percent", 0.0)
        p.results = {**results, "best_top1_percent": max(best, found.top1_percent)}
        p.epoch, p.batch, p.loss_sum = p.epoch + 1, 0, 0.0

    def _evaluate(self, model: torch.nn.Module) -> Evaluation:
        trainer = self.trainer
        with gathered_weights(model):
            found = evaluate(
                *(model, self.test_loader, trainer.device, trainer.spec.precision),
                ranks=self.ranks,
                stop=self.stop,
            )
        if not math.isfinite(found.test_loss):
            lr = trainer.last_lr
            error = trainer.diverged(f"test loss is {found.test_loss}", trainer.progress.step, lr)
            self._report(error, lr)
            raise error
        return found

    def _is_due(self) -> bool:
        every, minutes = self.options.checkpoint_every_steps, self.options.checkpoint_minutes
        return (every is not None and self.trainer.progress.step % every == 0) or (
            minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        )

    def _save(self, finished: bool = False) -> None:
        """Saves the state; all ranks are at the same step, and know the same bad images.

        Of a `finished` run the weights are written, and one checkpoint is kept.
        """
        self.saved_at = time.monotonic()
        p, known = self.trainer.progress, self.trainer.loader.bad_images
        if any(count for (count,) in self.ranks.gather(len(known))):
            known[:] = dict.fromkeys(sum(self.ranks.gather_objects(known), []))
        p.bad_images = known
        if self.writer is None or self.metrics is None:
            if self.trainer.shards:
                self.trainer.state()
            return
        p.metrics_bytes = self.metrics.position
        self.writer.write(p.step, self.trainer.state(), self.metrics.sync, finished)

    def _wait(self) -> None:
        """Waits until the last checkpoint is durable, on all ranks."""
        with self.ranks.raise_together():
            if self.writer is not None:
                self.writer.wait()

    def _report(self, error: Diverged, lr: float) -> None:
        """Writes where a training diverged, and on which images."""
        p, steps = self.trainer.progress, len(self.trainer.loader)
        if not self.ranks.is_leader:
            return
        report: Row = {"error": str(error), "steps_done": p.step, "epoch": p.epoch + 1, "lr": lr}
        report["batch_indices"] = self.trainer.batch_indices() if p.batch < steps else []
        write_json(self.directory / DIVERGED_FILE, report)


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Has Python look for garbage in what is new, and rarely in all that is there.

    A full collection walks through every pass of the graph: at 10,000 layers it would take a third
    of a step. Tensors do not wait for it, since they are in no cycles.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(before[0], before[1], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
