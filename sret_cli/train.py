"""Training and evaluation of one run."""

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from sret_cli import records
from sret_cli.data import Loader, load_data, load_test_data
from sret_cli.errors import DATA, SOME_FAILED, SretError, nearest
from sret_cli.measure import choose_device, device_name
from sret_cli.model import SReT
from sret_cli.recipe import TrainSpec
from sret_cli.records import Row
from sret_cli.recurse import build_any, count_layers
from sret_cli.study import Run
from sret_cli.weights import CONFIG_FILE, load_config, load_model, save_weights

METRICS_FILE = "metrics.jsonl"

OnStep = Callable[[int, int, str], None]  # steps done, steps in all, what to show


@dataclass(frozen=True)
class Evaluation:
    """Loss (mean cross-entropy) and accuracy over all images of a loader."""

    test_loss: float
    top1_percent: float
    top5_percent: float
    test_images: int
    images_by_class: tuple[int, ...] = ()
    correct_by_class: tuple[int, ...] = ()

    def row(self) -> Row:
        """The measurements of a row."""
        names = ("test_loss", "top1_percent", "top5_percent", "test_images")
        return {name: getattr(self, name) for name in names}

    def per_class(self, classes: tuple[str, ...]) -> list[Row]:
        """Images and top-1 of each class that images were tested of, in the order of the names."""
        counts = zip(classes, self.images_by_class, self.correct_by_class, strict=False)
        return [
            {"class": name, "test_images": images, "top1_percent": 100 * correct / images}
            for name, images, correct in counts
            if images
        ]


def default_workers(train: TrainSpec) -> int:
    """Loader processes: none for the tiny embedded images, else one a core and 8 at the most."""
    return 0 if train.dataset == "digits" else min(os.cpu_count() or 1, 8)


def train(
    run: Run,
    directory: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    on_step: OnStep = lambda done, total, text: None,
) -> Row:
    """Trains a run and returns its measurements.

    Writes `config.json`, `metrics.jsonl` and, at the end, `model.safetensors` to the run's
    directory (`runs/<study>/<run_id>`). The same seed on the same machine gives bitwise the same
    losses: on a CPU always, on CUDA as far as torch has deterministic kernels.

    Raises:
        SretError: data or device are not there, or the loss is not finite.
    """
    if run.train is None:
        raise SretError("this run has no [train] table; add one, or use `sret profile`")
    spec, target_device = run.train, choose_device(device)
    directory = directory or run.directory(Path("runs"))
    use_deterministic_kernels(target_device)
    torch.manual_seed(spec.seed)
    workers = default_workers(spec) if workers is None else workers
    train_loader, test_loader = load_data(spec, run.model, workers)
    model = build_any(run.model).to(target_device)
    model.set_grad_checkpointing(spec.recompute == "pass")
    if spec.recursions_range is not None:
        model.set_recursions(spec.recursions_range[1])  # refuses what it has no weights for
    optimizer = create_optimizer(model, spec)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=spec.sched,
        num_epochs=spec.epochs,
        min_lr=spec.min_lr,
        warmup_epochs=spec.warmup_epochs,
        warmup_lr=spec.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    scheduler.step_update(0)

    records.make_directory(directory)
    config = {"study": run.study, "name": run.name, **run.spec()}
    if spec.dataset != "digits":
        config["classes"] = list(train_loader.classes)
    records.write_json(directory / CONFIG_FILE, config)
    total, step, images, seconds = spec.epochs * len(train_loader), 0, 0, 0.0
    with records.LineFile(directory / METRICS_FILE) as metrics:

        def log(**values: object) -> None:
            metrics.write(json.dumps(values, allow_nan=False))

        for epoch in range(spec.epochs):
            model.train()
            losses, start = [], time.perf_counter()
            for x, target in train_loader.epoch(epoch):
                lr = optimizer.param_groups[0]["lr"]
                if spec.recursions_range is not None:
                    model.set_recursions(drawn_recursions(spec, step))
                x, target = x.to(target_device, non_blocking=True), target.to(target_device)
                x = train_loader.normalize(x)
                with autocast(target_device, spec.precision):
                    output = model(x)
                loss = F.cross_entropy(output.float(), target, label_smoothing=spec.smoothing)
                losses.append(loss.item())
                _stop_if_diverged(losses[-1], f"loss is {losses[-1]}", step + 1, epoch + 1, lr)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if spec.clip_grad:
                    nn.utils.clip_grad_norm_(model.parameters(), spec.clip_grad)
                optimizer.step()
                step += 1
                images += len(x)
                scheduler.step_update(step)
                log(step=step, epoch=epoch + 1, loss=losses[-1], lr=lr)
                speed = images / (seconds + time.perf_counter() - start)
                on_step(step, total, f"loss {losses[-1]:.3f}, {speed:.0f} images/s")
            seconds += time.perf_counter() - start
            if spec.recursions_range is not None:
                model.set_recursions(None)
            evaluation = evaluate(model, test_loader, target_device, spec.precision)
            what = f"test loss is {evaluation.test_loss}"
            _stop_if_diverged(evaluation.test_loss, what, step, epoch + 1, lr)
            final_loss = sum(losses) / len(losses)
            log(epoch=epoch + 1, train_loss=final_loss, **evaluation.row())
    save_weights(model, directory)
    return {
        "bad_images": len({*train_loader.bad_images, *test_loader.bad_images}),
        "epochs_trained": spec.epochs,
        "train_seconds": seconds,
        "images_per_second": images / seconds,
        "final_loss": final_loss,
        **evaluation.row(),
        "device_name": device_name(target_device),
        "torch_version": torch.__version__,
    }


def _stop_if_diverged(loss: float, what: str, step: int, epoch: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise SretError(
            f"diverged: the {what} at step {step} (epoch {epoch}, lr {lr:.2g}); "
            "use a smaller train.lr or clip_grad",
            SOME_FAILED,
        )


def create_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """Timm's optimizer of that name, with weight decay on matrices alone.

    Raises:
        SretError: there is none, or it cannot work here.
    """
    if spec.opt not in list_optimizers():
        raise SretError(f"unknown opt {spec.opt!r}; {nearest(spec.opt, list_optimizers())}")
    try:
        optimizer = create_optimizer_v2(model, spec.opt, spec.lr, spec.weight_decay)
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or "it needs what is not here"
        raise SretError(f"opt = {spec.opt!r} cannot be used: {reason}; use adamw") from None
    if getattr(optimizer, "is_second_order", False):
        raise SretError(f"opt = {spec.opt!r} needs second derivatives; use adamw or another")
    return optimizer


def drawn_recursions(spec: TrainSpec, step: int) -> int:
    """The recursion count of a training step: the same in every process."""
    assert spec.recursions_range is not None
    return random.Random(f"{spec.seed} {step}").randint(*spec.recursions_range)


def evaluate_run(
    directory: Path,
    data_dir: str | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    device: str = "auto",
    workers: int | None = None,
    changes: Mapping[str, Any] | None = None,
    reference_shuffle: int | None = None,
    on_step: OnStep = lambda done, total, text: None,
    recursions: int | None = None,
    dataset: str | None = None,
) -> Row:
    """Evaluates a directory's weights on its run's test images, or on another folder's.

    A folder's images have ImageNet's mean and deviation; those of a model that was not trained here
    are resized and cropped as ImageNet's are, bicubic and with `crop_pct` 0.875. Another folder has
    as many classes as the model. On one machine, two evaluations with the same batch size agree
    bitwise: on a CPU always, on CUDA as far as torch has deterministic kernels.

    Args:
        directory: of a run, or of a model that was built or converted.
        data_dir: a folder with `val/` or `test/`; the run's own if None.
        batch_size: images a step.
        precision: fp32 or bf16.
        device: auto, cpu or cuda.
        workers: processes that load images.
        changes: fields of the spec to evaluate with instead, such as `img_size`.
        reference_shuffle: draw the permutations of tokens as the reference does, after this seed.
        on_step: is told of the progress.
        recursions: run the same blocks so many times instead, in every stage.
        dataset: what `data_dir` holds, a folder of images if None.

    Raises:
        SretError: the directory holds no model, or none for so many recursions, or the data are
            not there or have other classes.
    """
    config = load_config(directory)
    settings = dict(config.get("train") or {})
    own_data = data_dir is None and dataset is None  # whose classes a run may have room beside
    if not settings and own_data:
        raise SretError(
            f"{directory} was not trained here; name a folder with val/ by --data-dir", DATA
        )
    if not own_data:
        settings = {**settings, "dataset": dataset or "folder", "data_dir": data_dir}
    spec = TrainSpec(**{**settings, "batch_size": max(batch_size, 2), "precision": precision})
    target_device = choose_device(device)
    use_deterministic_kernels(target_device)
    model = load_model(directory, changes).to(target_device)
    layers = count_layers(model)
    if recursions is not None:
        if not isinstance(model, SReT):
            raise SretError(f"{directory} holds a timm model; its recursions cannot be changed")
        model.set_recursions(recursions)
        layers = model.spec.with_values(recursions=recursions).layers
    workers = default_workers(spec) if workers is None else workers
    test_loader, classes = load_test_data(spec, model.spec, workers)
    if len(classes) > model.num_classes or (len(classes) < model.num_classes and not own_data):
        raise SretError(
            f"the test images have {len(classes):,} classes, and the model has "
            f"{model.num_classes:,}; name data of as many (folders of the others may be empty)",
            DATA,
        )
    trained = config.get("classes", classes)
    if not own_data and list(trained) != list(classes):
        name = min(set(trained) ^ set(classes))
        raise SretError(
            f"the model was trained on other classes than the test images have, {name!r} for one; "
            "name data with the same folders (they may be empty)",
            DATA,
        )
    if reference_shuffle is not None:
        model.set_reference_shuffle()
        torch.manual_seed(reference_shuffle)
    evaluation = evaluate(model, test_loader, target_device, precision, on_step)
    return {
        "run_id": directory.name,
        "name": config.get("name"),
        "layers": layers,
        "params": sum(p.numel() for p in model.parameters()),
        "recursions": recursions,
        "bad_images": len(test_loader.bad_images),
        **evaluation.row(),
        "per_class": evaluation.per_class(classes),
        "model.img_size": model.spec.img_size,
        "reference_shuffle": reference_shuffle,
        "device_name": device_name(target_device),
        "torch_version": torch.__version__,
    }


def use_deterministic_kernels(device: torch.device) -> None:
    """Makes CUDA repeat itself as far as torch has deterministic kernels; a CPU always does."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model of that precision runs; fp32 leaves everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    precision: str = "fp32",
    on_step: OnStep = lambda done, total, text: None,
) -> Evaluation:
    """Evaluates a model, in eval mode, on every image of a loader; deterministic.

    Raises:
        SretError: an image cannot be decoded.
    """
    training = model.training
    model.eval()
    loss, top1, top5, images = 0.0, 0, 0, 0
    tested: list[Tensor] = []
    correct: list[Tensor] = []
    with torch.inference_mode():
        for done, (x, target) in enumerate(loader.epoch(0)):
            target = target.to(device)
            with autocast(device, precision):
                output = model(loader.normalize(x.to(device)))
            loss += F.cross_entropy(output.float(), target, reduction="sum").item()
            best = output.topk(min(5, output.shape[1])).indices.eq(target[:, None])
            top1 += int(best[:, 0].sum())
            tested.append(target.bincount(minlength=output.shape[1]))
            correct.append(target[best[:, 0]].bincount(minlength=output.shape[1]))
            top5 += int(best.sum())
            images += len(x)
            on_step(done + 1, len(loader), f"{images} images")
    model.train(training)
    return Evaluation(
        loss / images,
        100 * top1 / images,
        100 * top5 / images,
        images,
        tuple(torch.stack(tested).sum(0).tolist()),
        tuple(torch.stack(correct).sum(0).tolist()),
    )
