"""Hashes of everything that a training reads; a run resumes only with the same contents."""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from sret_cli.data.fingerprint import Fingerprint, Images, read_fingerprints
from sret_cli.data.readers import known_source
from sret_cli.data.soft_labels import read_labels_spec
from sret_cli.data.sources import Source
from sret_cli.data.streams import Shards, find_shards
from sret_cli.runtime.errors import CHECKPOINT, SretError
from sret_cli.runtime.files import read_json
from sret_cli.runtime.files import sha256 as file_sha256
from sret_cli.spec.contents import Contents
from sret_cli.spec.dataset import has_stored_images, is_stream
from sret_cli.spec.run import CONFIG_FILE, Run
from sret_cli.spec.train import TrainSpec
from sret_cli.weights.store import WEIGHTS_FILE

Splits = dict[str, Images]


def find_splits(
    dataset: str, data_dir: str | None, skips: bool = False, label_column: str | None = None
) -> Splits:
    """The training and test images of a dataset that is read from files.

    Raises:
        SretError: the files do not exist, or have no labelled images.
    """
    found: dict[str, Source | Shards] = {}
    for split in ("train", "test"):
        training = split == "train"
        if is_stream(dataset):
            found[split] = find_shards(str(data_dir), training, label_column)
        else:
            found[split] = known_source(dataset, data_dir, training, label_column)
    return {split: Images(images, data_dir, skips) for split, images in found.items()}


def fingerprints(splits: Splits, seed: int) -> dict[str, Fingerprint]:
    """The fingerprint of each split.

    Raises:
        SretError: an image cannot be read, or differs from the manifest.
    """
    return {split: images.fingerprint(seed) for split, images in splits.items()}


def find_contents(train: TrainSpec, found: dict[str, Fingerprint]) -> Contents:
    """The hashes of what a training reads: images by their fingerprints, weights and labels.

    Raises:
        SretError: weights or labels do not exist, or cannot be read.
    """
    sums = data_sums(found)
    if train.init is not None:
        sums["init_sha256"] = _sum_of_model(Path(train.init), "classes")
    if train.soft_labels is not None:
        sums["soft_labels_sha256"] = read_labels_spec(Path(train.soft_labels)).sha256
    if (teacher := teacher_sha256(train)) is not None:
        own = train.teacher_checkpoint is None
        sums["teacher_sha256" if own else "teacher_checkpoint_sha256"] = teacher
    return Contents(**sums)


def data_sums(found: dict[str, Fingerprint]) -> dict[str, str]:
    """The hashes of all splits together, by their names in `Contents`; empty without splits."""
    if not found:
        return {}
    texts = {key: " ".join(getattr(f, key) for f in found.values()) for key in ("files", "sample")}
    return {f"data_{key}_sha256": sha256(text.encode()).hexdigest() for key, text in texts.items()}


def teacher_sha256(train: TrainSpec) -> str | None:
    """The hash of a teacher that is in a file or a directory; None for pretrained timm models.

    Raises:
        SretError: the file cannot be read.
    """
    if train.teacher_checkpoint is not None:
        return _sum_of_weights(Path(train.teacher_checkpoint))
    if train.teacher is None or not Path(train.teacher).is_dir():
        return None
    return _sum_of_model(Path(train.teacher), "model", "classes")


def _sum_of_model(directory: Path, *keys: str) -> str:
    """The hash of the weights in a directory and of these keys of its `config.json`.

    The logits of a teacher depend on its design and on the names of its classes, the weights that
    `init` loads depend on the names.
    """
    weights = _sum_of_weights(directory / WEIGHTS_FILE)
    config = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).exists() else None
    known = {key: config.get(key) for key in keys} if isinstance(config, dict) else {}
    return sha256(f"{weights} {json.dumps(known, sort_keys=True)}".encode()).hexdigest()


def _sum_of_weights(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise SretError(f"cannot read the weights {path}: {error.strerror}", CHECKPOINT) from None


class Identifier:
    """Hashes what runs read, and lists each dataset once for all runs and their trainings.

    A new `Identifier` forgets the lists that this process made before.
    """

    def __init__(self) -> None:
        known_source.cache_clear()
        self.splits: dict[tuple[str, str | None, bool, str | None], Splits] = {}
        self.found: dict[Any, dict[str, Fingerprint]] = {}

    def identify(self, run: Run) -> Run:
        """The run with the hashes of what it reads; unchanged if it has them.

        Raises:
            SretError: data, weights or labels do not exist or cannot be read.
        """
        if run.contents is not None or run.train is None:
            return run
        return replace(run, contents=find_contents(run.train, self._fingerprints(run.train)))

    def _fingerprints(self, train: TrainSpec) -> dict[str, Fingerprint]:
        if not has_stored_images(train.dataset):
            return {}
        key = (
            train.dataset,
            train.data_dir,
            train.on_bad_image == "skip",
            train.label_column,
        )
        if key not in self.splits:
            self.splits[key] = find_splits(
                dataset=train.dataset,
                data_dir=train.data_dir,
                skips=train.on_bad_image == "skip",
                label_column=train.label_column,
            )
        if (*key, train.seed) not in self.found:
            self.found[*key, train.seed] = fingerprints(self.splits[key], train.seed)
        return self.found[*key, train.seed]


def refuse_others(
    run: Run, directory: Path, found_images: Sequence[Source | Shards]
) -> tuple[Run, dict[str, Fingerprint]]:
    """The run with the hashes of what it reads, and the fingerprints of its images.

    The hashes have to equal those of the run or, if it has none, those of the directory's
    `config.json`.

    Args:
        run: the run to train.
        directory: the run's.
        found_images: the training images and the test images.

    Raises:
        SretError: they differ; the message names the first class or file that differs.
    """
    assert run.train is not None
    splits: Splits = {}
    if has_stored_images(run.train.dataset):
        skips = run.train.on_bad_image == "skip"
        for split, images in zip(("train", "test"), found_images, strict=True):
            splits[split] = Images(images, run.train.data_dir, skips)
    found = fingerprints(splits, run.train.seed)
    now = find_contents(run.train, found)
    known = run.contents
    if known is None and (directory / CONFIG_FILE).exists():
        config = read_json(directory / CONFIG_FILE)
        known = Contents.of(config.get("contents") if isinstance(config, dict) else None)
    stored = read_fingerprints(directory)
    if not stored and run.continues is not None:
        stored = read_fingerprints(directory.parent / run.continues)
    if known is not None and not data_sums(stored).items() <= known.table().items():
        stored = {}  # they are of another run that used this directory
    what = [] if known is None else known.differences(now)
    reasons = [
        compared.difference(stored[split], run.train.seed, split)
        for split, compared in splits.items()
        if split in stored
    ]
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None and "images" not in what:
        what = ["images", *what]
    if what:
        shown = f" ({reason})" if reason is not None and what[0] == "images" else ""
        raise SretError(
            f"the {' and the '.join(what)} are not those that {directory} was trained on{shown}; "
            "put them back, or give their place by --resume with --data-dir or --set",
            CHECKPOINT,
        )
    return replace(run, contents=now), found
