"""Training and evaluation of one run."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from sret_cli import records
from sret_cli.data import Loader, load_data
from sret_cli.errors import DATA, SOME_FAILED, SretError, nearest
from sret_cli.measure import choose_device, device_name
from sret_cli.records import Row
from sret_cli.recurse import build_any, count_layers
from sret_cli.spec import TrainSpec
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
    if target_device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(spec.seed)
    workers = default_workers(spec) if workers is None else workers
    train_loader, test_loader = load_data(spec, run.model, workers)
    model = build_any(run.model).to(target_device)
    model.set_grad_checkpointing(spec.recompute == "pass")
    if spec.opt not in list_optimizers():
        raise SretError(f"unknown opt {spec.opt!r}; {nearest(spec.opt, list_optimizers())}")
    optimizer = create_optimizer_v2(model, spec.opt, spec.lr, spec.weight_decay)
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
    records.write_json(
        directory / CONFIG_FILE, {"study": run.study, "name": run.name, **run.spec()}
    )
    total, step, images, seconds = spec.epochs * len(train_loader), 0, 0, 0.0
    with open(directory / METRICS_FILE, "w", encoding="utf-8") as metrics:

        def log(**values: object) -> None:
            metrics.write(json.dumps(values) + "\n")
            metrics.flush()

        for epoch in range(spec.epochs):
            model.train()
            losses, start = [], time.perf_counter()
            for x, target in train_loader.epoch(epoch):
                lr = optimizer.param_groups[0]["lr"]
                x, target = x.to(target_device, non_blocking=True), target.to(target_device)
                with autocast(target_device, spec.precision):
                    output = model(x)
                loss = F.cross_entropy(output.float(), target, label_smoothing=spec.smoothing)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise SretError(
                        f"diverged: the loss is {losses[-1]} at step {step + 1} "
                        f"(epoch {epoch + 1}, lr {lr:.2g}); use a smaller train.lr or clip_grad",
                        SOME_FAILED,
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if spec.clip_grad is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), spec.clip_grad)
                optimizer.step()
                step += 1
                images += len(x)
                scheduler.step_update(step)
                log(step=step, epoch=epoch + 1, loss=losses[-1], lr=lr)
                speed = images / (seconds + time.perf_counter() - start)
                on_step(step, total, f"loss {losses[-1]:.3f}, {speed:.0f} images/s")
            seconds += time.perf_counter() - start
            evaluation = evaluate(model, test_loader, target_device, spec.precision)
            final_loss = sum(losses) / len(losses)
            log(epoch=epoch + 1, train_loss=final_loss, **vars(evaluation))
    save_weights(model, directory)
    return {
        "epochs_trained": spec.epochs,
        "train_seconds": seconds,
        "images_per_second": images / seconds,
        "final_loss": final_loss,
        **vars(evaluation),
        "device_name": device_name(target_device),
        "torch_version": torch.__version__,
    }


def evaluate_run(
    directory: Path,
    data_dir: str | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    device: str = "auto",
    workers: int | None = None,
) -> Row:
    """Evaluates the weights in a run's directory on its test images, or on another folder's.

    Raises:
        SretError: the directory holds no model, or the data are not there or have other classes.
    """
    config = load_config(directory)
    settings = dict(config.get("train") or {})
    if data_dir is not None:
        settings = {**settings, "dataset": "folder", "data_dir": data_dir}
    spec = TrainSpec(**{**settings, "batch_size": max(batch_size, 2), "precision": precision})
    target_device = choose_device(device)
    model = load_model(directory).to(target_device)
    workers = default_workers(spec) if workers is None else workers
    _, test_loader = load_data(spec, model.spec, workers)
    if max(test_loader.samples.source.targets) >= model.num_classes:
        raise SretError(
            f"the test images have more classes than the model's {model.num_classes}; "
            "name the data that it was trained on",
            DATA,
        )
    evaluation = evaluate(model, test_loader, target_device, precision)
    return {
        "run_id": directory.name,
        "name": config.get("name"),
        "layers": count_layers(model),
        "params": sum(p.numel() for p in model.parameters()),
        **vars(evaluation),
        "device_name": device_name(target_device),
        "torch_version": torch.__version__,
    }


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
    with torch.inference_mode():
        for done, (x, target) in enumerate(loader.epoch(0)):
            target = target.to(device)
            with autocast(device, precision):
                output = model(x.to(device))
            loss += F.cross_entropy(output.float(), target, reduction="sum").item()
            best = output.topk(min(5, output.shape[1])).indices.eq(target[:, None])
            top1 += int(best[:, 0].sum())
            top5 += int(best.sum())
            images += len(x)
            on_step(done + 1, len(loader), f"{images} images")
    model.train(training)
    return Evaluation(loss / images, 100 * top1 / images, 100 * top5 / images, images)
