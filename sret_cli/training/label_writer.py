"""Writes soft labels: applies a teacher once to several crops of every image."""

import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sret_cli.data.augment import MODES, Pixels, as_byte_values
from sret_cli.data.fingerprint import Images, write_fingerprints
from sret_cli.data.image_notes import Noted, noted, show_warnings, without_notes
from sret_cli.data.loader import load_batches
from sret_cli.data.prepare import find_source
from sret_cli.data.soft_labels import (
    HEADER_FILE,
    LABELS_FILE,
    MAX_SIDE,
    PROGRESS_FILE,
    Crop,
    LabelsSpec,
    draw_crop,
    read_labels_spec,
    stored_classes,
)
from sret_cli.data.sources import Source
from sret_cli.runtime.device import choose_device, use_deterministic_kernels
from sret_cli.runtime.errors import (
    CHECKPOINT,
    USAGE,
    SretError,
    as_loader_lost,
    notes_shown_by,
    show_note,
)
from sret_cli.runtime.files import cannot_write_error, read_json, sha256, sync_directory, write_json
from sret_cli.runtime.lock import locked_directory
from sret_cli.runtime.progress import OnStep, Progress
from sret_cli.spec.backbone import Spec
from sret_cli.spec.dataset import has_lasting_indices
from sret_cli.spec.options import RunOptions
from sret_cli.spec.train import TrainSpec
from sret_cli.training.evaluate import default_workers
from sret_cli.training.identify import teacher_sha256
from sret_cli.training.teacher import Teacher

SAVED_EVERY_SECONDS = 60
IMAGENET_IMAGES = 1_281_167

Crops = tuple[Tensor, list[Crop]] | SretError  # pixels [crops, C, Y, X]; the error of an image


class ImageCrops(Dataset):
    """The crops of each image, by its index."""

    def __init__(self, source: Source, spec: LabelsSpec) -> None:
        self.source, self.spec = source, spec

    def __getitem__(self, index: int) -> Crops | Noted:
        """The crops, or the error of the image; a worker that raised it would lose its type."""
        return noted(lambda: self._crops(index), lambda: self.source.filename(index))

    def _crops(self, index: int) -> Crops:
        try:
            image, _ = self.source.open(index, MODES[self.spec.in_chans])
        except SretError as error:
            return error
        if max(image.size) > MAX_SIDE:
            return SretError(
                f"{self.source.filename(index)} is {image.width:,} x {image.height:,} pixels; "
                f"labels have room for {MAX_SIDE:,} a side; make it smaller"
            )
        crops = [
            draw_crop(image, spec=self.spec, index=index, number=n) for n in range(self.spec.crops)
        ]
        return torch.stack([crop.cut(image, self.spec) for crop in crops]), crops


def write_labels(
    train: TrainSpec,
    student: Spec,
    directory: Path,
    crops: int = 10,
    top_k: int = 10,
    batch_size: int = 256,
    options: RunOptions = RunOptions(),
    progress: Progress = Progress(),
) -> LabelsSpec:
    """Writes the probabilities of a training's teacher for its images; resumes if interrupted.

    Finished labels are left as they are. With `on_bad_image = "skip"`, an image that cannot be read
    has no label.

    Args:
        train: the training, with a teacher; its crops, flips, seed and temperature are used.
        student: the model that the labels are for.
        directory: where to write; made if it does not exist.
        crops: crops of each image; epochs use them in turn.
        top_k: classes that are stored for each crop; all classes at most.
        batch_size: crops that the teacher takes at a time.
        options: the device, and the processes that load images.
        progress: receives the images that are done, and notes: the size of the labels before they
            are written, and bad images.

    Raises:
        SretError: the data or the teacher do not exist, an image cannot be decoded, a process that
            loads images is gone, the directory has other labels, or the disk has no room for these.
    """
    if not has_lasting_indices(train.dataset):
        raise SretError(
            f"dataset = {train.dataset!r} has no numbered images to store labels for; use another "
            "dataset, or a live teacher"
        )
    with notes_shown_by(progress.note):
        target_device = choose_device(options.device)
        use_deterministic_kernels(target_device)
        source = find_source(train, student, training=True, order=stored_classes(directory, train))
        teacher = Teacher(train, student, device=target_device, classes=source.class_list)
        images = Images(source, train.data_dir, train.on_bad_image == "skip").fingerprint(
            train.seed
        )
        spec = LabelsSpec(
            teacher=str(train.teacher),
            teacher_sha256=teacher_sha256(train),
            teacher_img_size=teacher.img_size,
            images=len(source),
            images_sha256=images.sha256,
            crops=crops,
            top_k=min(top_k, student.num_classes),
            classes=source.class_list.names,
            **{k: getattr(student, k) for k in ("num_classes", "in_chans", "img_size")},
            **{k: getattr(train, k) for k in ("scale", "hflip", "interpolation", "seed")},
            **{k: getattr(train, k) for k in ("distill_temperature", "precision")},
        )
        show_note(
            f"labels of {spec.images:,} images, {crops} crops each, {spec.record.itemsize} bytes a "
            f"crop: {_megabytes(spec.size_bytes())}; ImageNet's {IMAGENET_IMAGES:,} images would "
            f"take {_megabytes(spec.size_bytes(IMAGENET_IMAGES))}"
        )
        with locked_directory(directory):
            done = _images_done(directory, spec)
            if done is None:
                show_note(f"{directory} already has these labels")
                return read_labels_spec(directory)
            write_fingerprints(directory, {"train": images})
            batches = _batches(
                source,
                spec,
                start=done,
                images=max(batch_size // crops, 1),
                workers=default_workers(train) if options.workers is None else options.workers,
            )
            labeller = Labeller(
                teacher, spec, pixels=Pixels.of(train, student), batch_size=batch_size
            )
            with closing(batches), _reserved(directory, spec) as file:
                _write(
                    file,
                    directory,
                    done=done,
                    batches=batches,
                    labeller=labeller,
                    on_bad_image=train.on_bad_image,
                    on_step=progress.on_step,
                )
            spec = spec.with_values(sha256=sha256(directory / LABELS_FILE))
            write_json(directory / HEADER_FILE, spec.model_dump(mode="json"))
            (directory / PROGRESS_FILE).unlink(missing_ok=True)
        return spec


class Labeller:
    """The probabilities of a teacher for crops, as records."""

    def __init__(self, teacher: Teacher, spec: LabelsSpec, pixels: Pixels, batch_size: int) -> None:
        self.teacher, self.spec, self.batch_size = teacher, spec, batch_size
        self.mean = as_byte_values(pixels.mean, teacher.device)
        self.std = as_byte_values(pixels.std, teacher.device)

    def records(self, batch: list[Crops]) -> np.ndarray:
        """The records `[crops, images]`; zeros for images that cannot be read."""
        records = np.zeros((len(batch), self.spec.crops), self.spec.record)
        for number, found in enumerate(batch):
            if not isinstance(found, SretError):
                records[number]["box"] = [crop[:4] for crop in found[1]]
                records[number]["flip"] = [crop.flip for crop in found[1]]
        good = [found[0] for found in batch if not isinstance(found, SretError)]
        if good:
            probabilities, classes = self._best(torch.cat(good))
            readable = [not isinstance(found, SretError) for found in batch]
            shape = (len(good), self.spec.crops, self.spec.top_k)
            records["probabilities"][readable] = probabilities.numpy().reshape(shape)
            records["classes"][readable] = classes.numpy().reshape(shape)
        return records.T

    def _best(self, images: Tensor) -> tuple[Tensor, Tensor]:
        best = []
        for part in images.split(self.batch_size):
            x = part.to(self.teacher.device).float().sub_(self.mean).div_(self.std)
            soft = (self.teacher(x) / self.spec.distill_temperature).softmax(1)
            best.append(soft.topk(self.spec.top_k))
        return torch.cat([b.values for b in best]).cpu(), torch.cat([b.indices for b in best]).cpu()


def _batches(
    source: Source, spec: LabelsSpec, start: int, images: int, workers: int
) -> Generator[list[Crops]]:
    """The crops of all images from index `start` on, of `images` images at a time."""
    indices = range(start, len(source))
    loader = DataLoader(
        ImageCrops(source, spec),
        batch_sampler=[list(indices[n : n + images]) for n in range(0, len(indices), images)],
        num_workers=workers,
        collate_fn=list,
    )
    for batch in load_batches(loader):
        crops, warnings = without_notes(batch)
        show_warnings(warnings)
        yield crops


def _write(
    file: BinaryIO,
    directory: Path,
    done: int,
    batches: Iterator[list[Crops]],
    labeller: Labeller,
    on_bad_image: str,
    on_step: OnStep,
) -> None:
    spec = labeller.spec

    def save() -> None:
        os.fsync(file.fileno())
        _write_progress(directory, spec, done)

    size, started, saved_at, first = spec.record.itemsize, time.monotonic(), time.monotonic(), done
    try:
        for batch in batches:
            for error in (found for found in batch if isinstance(found, SretError)):
                if on_bad_image == "stop":
                    raise SretError(str(error), error.code)
                show_note(f"{error}; it has no label")
            for number, records in enumerate(labeller.records(batch)):
                file.seek((number * spec.images + done) * size)
                file.write(records.tobytes())
            done += len(batch)
            speed = (done - first) * spec.crops / (time.monotonic() - started)
            on_step(done, spec.images, f"{speed:.0f} crops/s")
            if time.monotonic() - saved_at > SAVED_EVERY_SECONDS:
                save()
                saved_at = time.monotonic()
    except RuntimeError as error:
        lost = as_loader_lost(error)
        if lost is None:
            raise
        raise lost from None
    finally:  # also after a signal
        save()


def _images_done(directory: Path, spec: LabelsSpec) -> int | None:
    """The number of images that the labels in a directory have; None if they are finished.

    Raises:
        SretError: the labels were made with other settings; the message names what differs.
    """
    finished, path = (directory / HEADER_FILE).exists(), directory / PROGRESS_FILE
    if finished:
        found: Any = read_labels_spec(directory).model_dump(mode="json")
    elif not path.exists() or not (directory / LABELS_FILE).exists():
        return 0
    else:
        progress = read_json(path)
        try:
            found, done = dict(progress["labels"]), int(progress["images_done"])
        except (KeyError, TypeError, ValueError):
            raise SretError(f"{path} is damaged; remove {directory}", CHECKPOINT) from None
    for key, value in spec.model_dump(mode="json").items():
        unnamed = key == "classes" and found.get(key) is None  # labels of an earlier version
        moved = key == "teacher" and spec.teacher_sha256 is not None  # its hash is compared
        if key != "sha256" and not (unnamed or moved) and found.get(key) != value:
            raise SretError(
                f"{directory} has labels with {key} = {found.get(key)}, not {value}; choose "
                "another directory, or remove this one",
                USAGE,
            )
    return None if finished else done


def _write_progress(directory: Path, spec: LabelsSpec, done: int) -> None:
    progress = {"labels": spec.model_dump(mode="json"), "images_done": done}
    write_json(directory / PROGRESS_FILE, progress)


def _reserved(directory: Path, spec: LabelsSpec) -> BinaryIO:
    """The file of records, with disk space reserved for all of them.

    Raises:
        SretError: the disk has no room, or the file cannot be written.
    """
    path = directory / LABELS_FILE
    try:
        file = open(path, "r+b" if path.exists() else "w+b", buffering=0)
        try:
            os.posix_fallocate(file.fileno(), 0, spec.size_bytes())
            file.truncate(spec.size_bytes())
        except BaseException:
            file.close()
            raise
        sync_directory(directory)
    except OSError as error:
        raise cannot_write_error(path, error, spec.size_bytes()) from None
    return file


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
