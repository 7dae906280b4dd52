"""Training of one run: its epochs, and all that keeps them from being lost."""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sret_cli import records
from sret_cli.checkpoint import Writer, newest
from sret_cli.data import Loader, load_data
from sret_cli.errors import CHECKPOINT, RESOURCES, SretError, note, out_of_memory
from sret_cli.evaluate import (
    Evaluation,
    OnStep,
    default_workers,
    evaluate,
    evaluate_run,
    use_deterministic_kernels,
)
from sret_cli.interrupt import Interrupted, Stop, listening
from sret_cli.measure import choose_device, device_name, free_bytes
from sret_cli.memory import Setting, largest_batch, predict
from sret_cli.metrics import METRICS_FILE, Metrics
from sret_cli.optimizer import drawn_recursions
from sret_cli.records import CONFIG_FILE, Row
from sret_cli.spec import ModelSpec
from sret_cli.study import Run
from sret_cli.trainer import Diverged, Trainer
from sret_cli.weights import save_weights

__all__ = ["METRICS_FILE", "Saving", "drawn_recursions", "evaluate", "evaluate_run", "train"]

DIVERGED_FILE = "diverged.json"
EMA_DIRECTORY = "ema"


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, beside the end of every epoch; None is never."""

    every_steps: int | None = None
    minutes: float | None = 10.0


def train(
    run: Run,
    directory: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    on_step: OnStep = lambda done, total, text: None,
    note: Callable[[str], None] = note,
    saving: Saving = Saving(),
    tensorboard: bool = False,
    gpu_memory: int | None = None,
) -> Row:
    """Trains a run and returns its measurements; goes on from its newest checkpoint, if it has one.

    Writes `config.json`, `metrics.jsonl`, checkpoints and, at the end, `model.safetensors` to the
    run's directory (`runs/<study>/<run_id>`), and the averaged weights to `ema/` in it. The same
    seed on the same machine gives bitwise the same losses, also where it was interrupted: on a CPU
    always, on CUDA as far as torch has deterministic kernels. `gpu_memory` is a
    budget in bytes for `recompute = "auto"`.

    Raises:
        SretError: data or device are not there, the loss is not finite, memory or disk are full,
            another process trains the run, or what is in the directory is of another run.
        KeyboardInterrupt, SystemExit: a signal came; the state is saved.
    """
    if run.train is None:
        raise SretError("this run has no [train] table; add one, or use `sret profile`")
    target_device = choose_device(device)
    directory = directory or run.directory(Path("runs"))
    use_deterministic_kernels(target_device)
    workers = default_workers(run.train) if workers is None else workers
    loaders = load_data(run.train, run.model, workers)
    trainer = Trainer(run, loaders[0], target_device, gpu_memory=gpu_memory)
    with records.locked(directory), listening() as stop:
        records.write_config(directory, describe(run, loaders[0]))
        session = Session(trainer, loaders[1], directory, saving, stop, on_step, note)
        session.resume()
        metrics = Metrics(
            *(directory, trainer.progress.metrics_bytes, trainer.progress.step),
            *(tensorboard, note),
        )
        try:
            with metrics:
                return session.run(metrics)
        except Interrupted:
            stop.leave()
        except (RuntimeError, MemoryError) as error:
            if stop.code is not None:  # the signal ended the loader's processes, too
                stop.leave()
            if out_of_memory(error) is None:
                raise
            raise _out_of_memory(error, trainer) from None
        finally:
            session.writer.close()


def describe(run: Run, loader: Loader) -> Row:
    """What `config.json` says of a run."""
    config = {"study": run.study, "name": run.name, **run.spec()}
    if run.train is not None and run.train.dataset != "digits":
        config["classes"] = list(loader.classes)
    return config


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
        saving: Saving,
        stop: Stop,
        on_step: OnStep,
        note: Callable[[str], None],
    ) -> None:
        self.trainer, self.test_loader, self.directory = trainer, test_loader, directory
        self.saving, self.stop, self.on_step, self.note = saving, stop, on_step, note
        self.writer = Writer(directory)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Goes on from the newest checkpoint that is sound, where there is one."""
        continues, trainer = self.trainer.run.continues, self.trainer
        found = newest(self.directory, self.note)
        if found is not None:
            self.writer = Writer(self.directory, found.path)
        elif continues is not None:
            source = self.directory.parent / continues
            found = newest(source, self.note)
            if found is None:
                raise SretError(f"{source} has no checkpoint to continue", CHECKPOINT)
        if found is None:
            return
        if changed := trainer.load(found):
            self.note(f"{found.path} was written by {', '.join(changed)}: last digits may differ")
        if found.path.parent != self.directory:
            lines = (found.path.parent / METRICS_FILE).read_bytes()
            records.write_atomically(
                self.directory / METRICS_FILE, lines[: trainer.progress.metrics_bytes]
            )
        bad = trainer.progress.bad_images
        trainer.loader.bad_images += [text for text in bad if text not in trainer.loader.bad_images]

    def run(self, metrics: Metrics) -> Row:
        """All epochs that are left, then the weights; returns the run's measurements."""
        trainer, spec, p = self.trainer, self.trainer.spec, self.trainer.progress
        try:
            while p.epoch < spec.epochs:
                self._train_epoch(metrics)
                self._evaluate_epoch(metrics)
                self._save(metrics)
            self.writer.wait()
        except Diverged:
            self._save(metrics)
            self.writer.wait()
            raise
        except (Interrupted, RuntimeError):
            if self.stop.code is not None and trainer.whole:
                self.stop.be_patient()
                self._save(metrics)
                self.writer.wait()
            raise
        save_weights(trainer.module, self.directory)
        if trainer.ema is not None:
            ema = records.make_directory(self.directory / EMA_DIRECTORY)
            records.write_json(ema / CONFIG_FILE, describe(trainer.run, trainer.loader))
            save_weights(trainer.ema.module, ema)
        self.stop.check()
        return {
            "bad_images": len({*trainer.loader.bad_images, *self.test_loader.bad_images}),
            "epochs_trained": spec.epochs,
            "train_seconds": p.seconds,
            "images_per_second": p.images / p.seconds if p.seconds else None,
            **p.results,
            "device_name": device_name(trainer.device),
            "torch_version": torch.__version__,
        }

    def _train_epoch(self, metrics: Metrics) -> None:
        trainer, p = self.trainer, self.trainer.progress
        steps = len(trainer.loader)
        trainer.module.train()
        before, seconds = time.perf_counter(), p.seconds
        for images, target in trainer.loader.epoch(p.epoch, p.batch) if p.batch < steps else ():
            self.stop.keep_steps_whole()
            lr = trainer.lr
            try:
                loss = trainer.step(images, target)
            except Diverged as error:
                self._report(error, lr)
                raise
            metrics.write(p.step, step=p.step, epoch=p.epoch + 1, loss=loss, lr=lr)
            p.seconds = seconds + time.perf_counter() - before
            trainer.whole = True
            speed = f"{p.images / p.seconds:.0f} images/s"
            self.on_step(
                p.step,
                trainer.spec.epochs * steps,
                f"loss {loss:.3f}, lr {lr:.2g}, {speed}, {peak_gigabytes(trainer.device)}",
            )
            self.writer.check()
            if p.batch < steps and self._is_due():
                self._save(metrics)
            self.stop.check()

    def _evaluate_epoch(self, metrics: Metrics) -> None:
        """Evaluates, and moves on to the next epoch."""
        trainer, spec, p = self.trainer, self.trainer.spec, self.trainer.progress
        if spec.recursions_range is not None:
            trainer.module.set_recursions(None)
        found = self._evaluate(trainer.module)
        results: Row = {"final_loss": p.loss_sum / max(p.batch, 1), **found.row()}
        if trainer.ema is not None:
            averaged = self._evaluate(trainer.ema.module).row()
            results |= {f"ema_{k}": averaged[k] for k in averaged if k != "test_images"}
        line = {("train_loss" if k == "final_loss" else k): v for k, v in results.items()}
        metrics.write(p.step, epoch=p.epoch + 1, **line)
        best = p.results.get("best_top1_percent", 0.0)
        p.results = {**results, "best_top1_percent": max(best, found.top1_percent)}
        p.epoch, p.batch, p.loss_sum = p.epoch + 1, 0, 0.0

    def _evaluate(self, model: torch.nn.Module) -> Evaluation:
        trainer = self.trainer
        found = evaluate(
            *(model, self.test_loader, trainer.device, trainer.spec.precision),
            lambda done, total, text: self.stop.check(),
        )
        if not math.isfinite(found.test_loss):
            error = trainer.diverged(f"test loss is {found.test_loss}", trainer.progress.step)
            self._report(error, trainer.lr)
            raise error
        return found

    def _is_due(self) -> bool:
        every, minutes = self.saving.every_steps, self.saving.minutes
        return (every is not None and self.trainer.progress.step % every == 0) or (
            minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        )

    def _save(self, metrics: Metrics) -> None:
        self.saved_at = time.monotonic()
        p = self.trainer.progress
        p.metrics_bytes, p.bad_images = metrics.position, self.trainer.loader.bad_images
        self.writer.write(p.step, self.trainer.state(), metrics.sync)

    def _report(self, error: Diverged, lr: float) -> None:
        """Writes where a training diverged, and on which images."""
        p, steps = self.trainer.progress, len(self.trainer.loader)
        report: Row = {"error": str(error), "steps_done": p.step, "epoch": p.epoch + 1, "lr": lr}
        report["batch_indices"] = self.trainer.batch_indices() if p.batch < steps else []
        records.write_json(self.directory / DIVERGED_FILE, report)


def _out_of_memory(error: BaseException, trainer: Trainer) -> SretError:
    """The user's error, with what was in use and predicted, and what can be done about it."""
    spec, step = trainer.spec, trainer.progress.step + 1
    at_once = -(-spec.batch_size // spec.accumulation)
    advice, predicted = "use a smaller model or fewer layers", ""
    if at_once > 1:
        parts = range(spec.accumulation + 1, spec.batch_size + 1)
        fewer = next(n for n in parts if spec.batch_size % n == 0)
        advice = f"use train.accumulation = {fewer}, or a smaller batch_size"
    if isinstance(trainer.run.model, ModelSpec):
        setting = Setting(at_once, spec.precision, trainer.device.type, spec.opt)
        needed = predict(trainer.run.model, setting, spec.recompute)[0].training_memory_bytes
        predicted = f", {needed / 1e9:.1f} GB predicted"
        room = free_bytes(trainer.device) + used_bytes(trainer.device)
        fits = largest_batch(trainer.run.model, setting, spec.recompute, room)
        if 0 < fits < at_once:
            advice += f" ({fits:,} images fit at a time)"
    reason = str(error).partition("\n")[0] or "the allocator gave up"
    return SretError(
        f"out of memory at step {step} with {at_once:,} images at a time: "
        f"{peak_gigabytes(trainer.device)} in use at the most{predicted} ({reason}); {advice}",
        RESOURCES,
        status="out_of_memory",
    )


def used_bytes(device: torch.device) -> int:
    """What this process has of a device's memory now; on a CPU it is not told apart."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def peak_gigabytes(device: torch.device) -> str:
    """The most memory that was in use so far: CUDA's allocator's, or this process's."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{used / 1e9:.1f} GB"
