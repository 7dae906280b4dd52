"""Evaluation of a model on all test images."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_cli.data.class_names import ClassList, config_classes
from sret_cli.data.loader import Loader
from sret_cli.data.prepare import load_test_data
from sret_cli.model.compile import is_compiled
from sret_cli.model.kinds import count_layers, set_recursions
from sret_cli.model.sret import parameter_count
from sret_cli.runtime.device import autocast, choose_device, device_name, use_deterministic_kernels
from sret_cli.runtime.errors import DATA, SretError
from sret_cli.runtime.progress import OnStep, Progress
from sret_cli.runtime.signals import Stop
from sret_cli.spec.dataset import has_label_columns
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Row, run_directory
from sret_cli.spec.train import TrainSpec
from sret_cli.training.ranks import ALONE, Ranks
from sret_cli.weights.store import load_config, load_model


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
        """The columns of a row."""
        names = ("test_loss", "top1_percent", "top5_percent", "test_images")
        return {name: getattr(self, name) for name in names}

    def per_class(self, classes: tuple[str, ...]) -> list[Row]:
        """Images and top-1 of each class with test images, in the order of the names."""
        counts = zip(classes, self.images_by_class, self.correct_by_class, strict=False)
        return [
            {"class": name, "test_images": images, "top1_percent": 100 * correct / images}
            for name, images, correct in counts
            if images
        ]

    @property
    def mean_class_top1_percent(self) -> float:
        """The mean of the top-1 of all classes with test images."""
        counts = zip(self.images_by_class, self.correct_by_class, strict=True)
        accuracies = [100 * correct / images for images, correct in counts if images]
        return sum(accuracies) / len(accuracies)


def default_workers(train: TrainSpec) -> int:
    """Loader processes: none for `digits`, which are in memory; else one a core, at most 8."""
    return 0 if train.dataset == "digits" else min(os.cpu_count() or 1, 8)


@dataclass(frozen=True)
class EvaluationOptions:
    """The images to evaluate a trained model on, and changes to the model.

    Attributes:
        data_dir: folder with `val/` or `test/`; the run's own images if None.
        dataset: what `data_dir` holds; a folder of images if None.
        label_column: the column with the classes; the run's own if None.
        batch_size: images a step.
        precision: fp32 or bf16.
        changes: fields of the model's spec to evaluate with instead, such as `img_size`.
        recursions: passes through each block of every stage; the model's own if None.
        reference_shuffle: seed to draw shuffles as the reference code does; fixed ones if None.
    """

    data_dir: str | None = None
    dataset: str | None = None
    label_column: str | None = None
    batch_size: int = 256
    precision: str = "fp32"
    changes: Mapping[str, Any] | None = None
    recursions: int | None = None
    reference_shuffle: int | None = None


def evaluate_run(
    directory: Path,
    how: EvaluationOptions = EvaluationOptions(),
    options: RunOptions = RunOptions(),
    progress: Progress = Progress(),
) -> Row:
    """Evaluates the weights in a directory on the test images of their run, or on other images.

    A folder of images is normalised with the mean and deviation of ImageNet. For a model that was
    not trained here, images are resized (bicubic) and cropped (`crop_pct` 0.875) as those of
    ImageNet. Other images need the classes of the model, or as many classes if their names are not
    known. On one machine, two evaluations with the same batch size are bitwise equal: on a CPU
    always, on CUDA as far as torch has deterministic kernels.

    Args:
        directory: the directory of a run, or of a model that was built or converted.
        how: the images, and changes to the model.
        options: the device, and the processes that load images.
        progress: receives the batches that are done.

    Raises:
        SretError: the directory has no model, the model cannot have this number of recursions, or
            the data do not exist or have other classes.

    Examples:
        >>> from pathlib import Path
        >>> from sret_cli import PRESETS, TrainSpec, evaluate, train
        >>> from sret_cli.spec.run import Run
        >>> spec = TrainSpec(dataset="digits", epochs=1, warmup_epochs=0, batch_size=240)
        >>> directory = Path("runs/notebook/nano")
        >>> model = PRESETS["nano"].with_values(recursions=1)
        >>> row = train(Run("notebook", "nano", model, spec), directory)
        >>> evaluate(directory)["top1_percent"] == row["top1_percent"]
        True
    """
    config, home = load_config(directory), run_directory(directory)
    settings = dict(config.get("train") or {})
    own_data = how.data_dir is None and how.dataset is None
    if not settings and own_data:
        raise SretError(
            f"{directory} was not trained here; give a folder with val/ by --data-dir", DATA
        )
    if not own_data:
        settings = {**settings, "dataset": how.dataset or "folder", "data_dir": how.data_dir}
        if not has_label_columns(settings["dataset"]):
            settings.pop("label_column", None)
    if how.label_column is not None:
        settings["label_column"] = how.label_column
    settings |= {"batch_size": max(how.batch_size, 2), "precision": how.precision}
    spec = TrainSpec(**{**settings, "accumulation": 1, "mixup": 0.0, "cutmix": 0.0})
    target_device = choose_device(options.device)
    use_deterministic_kernels(target_device)
    model = load_model(directory, how.changes).to(target_device)
    if how.recursions is not None:
        set_recursions(model, how.recursions, str(directory))
    layers = count_layers(model)
    workers = default_workers(spec) if options.workers is None else options.workers
    trained = ClassList(
        config_classes(config),
        f"the model in {directory}",
        "give data with the same classes (some folders may be empty)",
    )
    order = None if own_data and trained.names is None else trained
    test_loader, classes = load_test_data(spec, model.spec, workers, order=order)
    # The run's own images, and images with the same class names, may have fewer classes.
    has_room = own_data or (test_loader.named and trained.names is not None)
    if len(classes) > model.num_classes or (len(classes) < model.num_classes and not has_room):
        raise SretError(
            f"the test images have {len(classes):,} classes, and the model has "
            f"{model.num_classes:,}; give data with as many classes (some folders may be empty)",
            DATA,
        )
    if how.reference_shuffle is not None:
        model.set_reference_shuffle()
        torch.manual_seed(how.reference_shuffle)
    evaluation = evaluate(
        model,
        loader=test_loader,
        device=target_device,
        precision=how.precision,
        on_step=progress.on_step,
    )
    return {
        "run_id": config.get("run_id", home.name),
        "name": config.get("name"),
        "averaged": home != Path(os.path.abspath(directory)) or config.get("averaged", False),
        "layers": layers,
        "params": parameter_count(model),
        "recursions": how.recursions,
        "bad_images": len(test_loader.bad_images),
        **evaluation.row(),
        "mean_class_top1_percent": evaluation.mean_class_top1_percent,
        "per_class": evaluation.per_class(classes),
        "model.img_size": model.spec.img_size,
        "reference_shuffle": how.reference_shuffle,
        "device_name": device_name(target_device),
        "torch_version": torch.__version__,
    }


def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    precision: str = "fp32",
    on_step: OnStep = lambda done, total, text: None,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
) -> Evaluation:
    """Evaluates a model in eval mode on all images of a loader; deterministic.

    Each rank evaluates its part of the images, and all ranks return the sum.

    Raises:
        SretError: an image cannot be decoded.
        Interrupted: `stop` has caught a signal.
    """
    training = model.training
    model.eval()
    loss, top1, top5, images, largest = 0.0, 0, 0, 0, 0
    tested: list[Tensor] = []
    correct: list[Tensor] = []
    with torch.inference_mode(), ranks.raise_together(stop):
        for done, (x, target) in enumerate(loader.epoch(0)):
            target = target.to(device)
            largest = max(largest, len(x))
            if is_compiled(model) and len(x) < largest:
                # pad the last batch so that no second shape is compiled
                x = torch.cat((x, x[:1].expand(largest - len(x), *x.shape[1:])))
            with autocast(device, precision):
                output = model(loader.normalize(x.to(device)))[: len(target)]
            loss += F.cross_entropy(output.float(), target, reduction="sum").item()
            best = output.topk(min(5, output.shape[1])).indices.eq(target[:, None])
            top1 += int(best[:, 0].sum())
            tested.append(target.bincount(minlength=output.shape[1]))
            correct.append(target[best[:, 0]].bincount(minlength=output.shape[1]))
            top5 += int(best.sum())
            images += len(target)
            on_step(done + 1, len(loader), f"{images} images")
            if stop is not None:
                stop.check()
    model.train(training)
    (classes,) = max(ranks.gather(len(tested[0]) if tested else 0))
    by_class = torch.zeros(2, classes, dtype=torch.double)
    for row, counts in zip(by_class, (tested, correct), strict=True):
        row += sum(counts, torch.zeros_like(row, device=device)).cpu()
    sums = torch.tensor([loss, top1, top5, images], dtype=torch.double)
    loss, top1, top5, images = ranks.sum(sums).tolist()
    ranks.sum(by_class)
    images_by_class, correct_by_class = by_class.long().tolist()
    return Evaluation(
        test_loss=loss / images,
        top1_percent=100 * top1 / images,
        top5_percent=100 * top5 / images,
        test_images=int(images),
        images_by_class=tuple(images_by_class),
        correct_by_class=tuple(correct_by_class),
    )
