"""WebDataset shards, read in sequence; the order of batches depends on ranks and workers."""

import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from sret_cli.data.augment import SampleTransform
from sret_cli.data.class_names import order_classes
from sret_cli.data.decode import EXTENSIONS, UNREADABLE, decode_image, unreadable_error
from sret_cli.data.folders import TEST_NAMES, refuse_cut
from sret_cli.data.image_notes import noted
from sret_cli.data.order import BatchPlan
from sret_cli.runtime.errors import DATA, SretError

BUFFERED_SAMPLES = 2_048  # the next sample is drawn from as many

T = TypeVar("T")


@dataclass(frozen=True)
class Shards:
    """Tar files, the number of samples in each, and the number of classes if it is known.

    `names` holds the names of the classes if the labels are names and not numbers.
    """

    paths: tuple[str, ...]
    samples: tuple[int, ...]
    classes: int | None
    names: tuple[str, ...] | None = None

    def filename(self, index: int) -> str:
        """The path of a shard."""
        return self.paths[index]


@cache
def find_shards(data_dir: str, training: bool, label_column: str | None = None) -> Shards:
    """The shards of a folder whose names contain `train`; for test images, one of `TEST_NAMES`.

    Samples are counted by reading all headers, unless an `_info.json` has the counts, as in timm's
    datasets; it does not have the classes. Labels are the numbers in the files `.cls`. With a
    `label_column`, they are numbers or names, in the files of that extension or else in that field
    of the files `.json`. Test images have the names of the training images.

    Raises:
        SretError: there are no shards, or one cannot be read, is cut short or has no samples; test
            images have a class that the training images do not have.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise SretError(
            "wds needs the package webdataset: pip install 'sret[data]'", DATA
        ) from None
    names = ("train",) if training else TEST_NAMES
    for name in names:
        paths = sorted(Path(data_dir).glob(f"*{name}*.tar"))
        if paths:
            break
    else:
        wanted = " or ".join(f"*{name}*.tar" for name in names)
        raise SretError(
            f"{data_dir} has no shards {wanted}; name their folder with --data-dir", DATA
        )
    for path in paths:
        refuse_cut(path)
    stored_counts = _stored_counts(Path(data_dir)) if label_column is None else {}
    labels: set[int | str] = set()
    if all(path.name in stored_counts for path in paths):
        counts = [stored_counts[path.name] for path in paths]
    else:
        counts = []
        for path in paths:
            samples, labels_of_shard = _count(path, label_column)
            counts.append(samples)
            labels |= labels_of_shard
    for path, samples in zip(paths, counts, strict=True):
        if not samples:  # a worker with only this shard would have nothing to return
            raise SretError(f"{path} has no samples: {_missing(label_column)}; remove it", DATA)
    class_names = _names(data_dir, training, label_column, labels)
    numbers = [label for label in labels if isinstance(label, int)]
    classes = max(numbers) + 1 if numbers else None
    return Shards(
        paths=tuple(map(str, paths)),
        samples=tuple(counts),
        classes=classes if class_names is None else len(class_names),
        names=class_names,
    )


def _missing(label_column: str | None) -> str:
    if label_column is None:
        return "no files .cls with numbers of classes (train.label_column chooses other labels)"
    return f"neither files .{label_column} nor files .json with a field {label_column!r}"


def _names(
    data_dir: str, training: bool, label_column: str | None, labels: set[int | str]
) -> tuple[str, ...] | None:
    """The names of the classes in the order of their numbers; None if labels are numbers."""
    if label_column is None:
        return None
    texts = {label for label in labels if isinstance(label, str)}
    trained: tuple[str, ...] | None = None
    if not training and any(Path(data_dir).glob("*train*.tar")):
        trained = find_shards(data_dir, True, label_column).names
    if (texts or trained) and len(texts) < len(labels):
        number = next(label for label in labels if isinstance(label, int))
        name = [*order_classes(texts), *(trained or ())][0]
        raise SretError(
            f"{data_dir}: label_column = {label_column!r} has both numbers ({number}) and names "
            f"({name!r}) of classes; write only numbers or only names",
            DATA,
        )
    if not texts or trained is None:
        return tuple(order_classes(texts)) if texts else None
    others = order_classes(texts - set(trained))
    if others:
        raise SretError(
            f"the test shards in {data_dir} have the class {others[0]!r}, which the training "
            "shards do not have; remove its images",
            DATA,
        )
    return trained


def _stored_counts(data_dir: Path) -> dict[str, int]:
    """The number of samples of each shard in `_info.json`."""
    path = data_dir / "_info.json"
    try:
        splits = json.loads(path.read_bytes())["splits"].values() if path.exists() else ()
        pairs = [zip(s["filenames"], s["shard_lengths"], strict=True) for s in splits]
        return {name: int(length) for pair in pairs for name, length in pair}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SretError(f"{path} has no valid filenames and shard_lengths; remove it") from None


def _count(path: Path, label_column: str | None) -> tuple[int, set[int | str]]:
    """The number of samples in a shard, and the set of their labels."""
    keys = ("cls",) if label_column is None else (label_column.lower(), "json")
    labels: dict[str, int | str] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = Path(member.name).name
                key = next((key for key in keys if name.lower().endswith(f".{key}")), None)
                stem = member.name[: -len(f".{key}")]
                if key is None or name.startswith(".") or (key != keys[0] and stem in labels):
                    continue
                file = tar.extractfile(member)
                assert file is not None
                label = read_label({key: file.read()}, label_column)
                if isinstance(label, int) and label < 0:
                    raise ValueError(f"{member.name} has the class {label}")
                if label is not None:
                    labels[stem] = label
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise SretError(f"cannot read {path}: {error}; fix or remove it", DATA) from None
    return len(labels), set(labels.values())


def read_label(sample: dict[str, Any], label_column: str | None) -> int | str | None:
    """The number or name of a sample's class, from the contents of its files; None without a label.

    Raises:
        ValueError: the label is neither a number nor a name.
    """
    extension = "cls" if label_column is None else label_column.lower()
    if extension in sample:
        text = sample[extension].decode().strip()
        if label_column is None and not text.removeprefix("-").isdecimal():
            raise ValueError(
                f"a file .cls holds {text!r}, not the number of a class; if this is a name, set "
                'train.label_column = "cls"'
            )
        return int(text) if label_column is None or text.isdecimal() else text
    fields = json.loads(sample["json"]) if label_column and "json" in sample else None
    label = fields.get(label_column) if isinstance(fields, dict) else None
    if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
        return label
    raise ValueError(f"its {label_column!r} is {label!r}, not the number or the name of a class")


class Stream(IterableDataset):
    """One rank's batches of an epoch over shards, from batch `start` on, as lists of samples.

    With a seed, shards and samples are shuffled, and a worker that reaches the end of its shards
    before the epoch ends reads them again, so that all ranks have the same number of batches.
    Without a seed, each sample comes once. The batches depend on the numbers of ranks and workers.

    Raises:
        SretError: there are fewer shards than processes.
    """

    def __init__(
        self,
        shards: Shards,
        transform: SampleTransform,
        plan: BatchPlan,
        workers: int,
        num_classes: int,
        label_column: str | None = None,
        names: tuple[str, ...] | None = None,
    ) -> None:
        self.source, self.transform, self.plan = shards, transform, plan
        self.num_classes, self.label_column = num_classes, label_column
        self.numbers = {name: number for number, name in enumerate(names or ())}
        self.workers = max(min(workers, len(shards.paths) // plan.world_size), 1)
        self.epoch, self.start = 0, 0
        if len(shards.paths) < plan.world_size:
            raise SretError(
                f"{len(shards.paths)} shards are too few for {plan.world_size} processes; "
                "make more shards, or use fewer processes",
                DATA,
            )

    def __len__(self) -> int:
        if self.plan.seed is not None:
            return max(sum(self.source.samples) // self.plan.batch_size, 1)
        counts = (self._of_worker(self.source.samples, worker) for worker in range(self.workers))
        return sum(-(-sum(count) // self.plan.rank_batch_size) for count in counts)

    def batch_indices(self, epoch: int, number: int) -> list[int]:
        """An empty list: samples of a stream have no index."""
        return []

    @property
    def image_count(self) -> None:
        """None: a stream takes its batches from no fixed list of images."""
        return None

    def _of_worker(self, values: Sequence[T], worker: int) -> Sequence[T]:
        return values[self.plan.rank * self.workers + worker :: self.plan.world_size * self.workers]

    def __iter__(self) -> Iterator[list[Any]]:
        info = get_worker_info()
        # The loader always asks worker 0 first, whichever batch it starts at.
        worker = ((info.id if info is not None else 0) + self.start) % self.workers
        samples = self._samples(worker)
        is_shuffled = self.plan.seed is not None
        numbers = range(worker, len(self), self.workers) if is_shuffled else count(0)
        try:
            for number in numbers:
                batch = list(islice(samples, self.plan.rank_batch_size))
                if not batch:
                    return
                if number >= self.start or not is_shuffled:
                    yield [self._noted(sample) for sample in batch]
        except (OSError, EOFError, tarfile.TarError) as error:
            yield [SretError(f"cannot read a shard: {error}; fix or remove it", DATA)]

    def _samples(self, worker: int) -> Iterator[dict[str, Any]]:
        """The undecoded samples of a worker: each once, or shuffled and without end."""
        import webdataset

        if self.plan.seed is None:
            paths = self._of_worker(self.source.paths, worker)
            yield from webdataset.DataPipeline(
                webdataset.SimpleShardList(list(paths)), webdataset.tarfile_to_samples()
            )
            return
        order = np.random.default_rng((self.plan.seed, self.epoch)).permutation(self.source.paths)
        rng = random.Random(f"{self.plan.seed} {self.epoch} {self.plan.rank} {worker}")
        paths = self._of_worker(order.tolist(), worker)
        while True:
            read = 0
            for sample in webdataset.DataPipeline(
                webdataset.SimpleShardList(list(paths)),
                webdataset.tarfile_to_samples(),
                webdataset.shuffle(BUFFERED_SAMPLES, initial=BUFFERED_SAMPLES, rng=rng),
            ):
                read += 1
                yield sample
            if not read:
                raise tarfile.ReadError(f"no samples in {', '.join(paths)}")

    def _noted(self, sample: dict[str, Any]) -> Any:
        name = f"{sample['__url__']}, {sample['__key__']}"
        return noted(lambda: self._transformed(sample, name), lambda: name)

    def _transformed(self, sample: dict[str, Any], name: str) -> tuple[Any, int] | SretError:
        extensions = [key for key in sample if f".{key.lower()}" in EXTENSIONS]
        try:
            label = read_label(sample, self.label_column)
            if not extensions or label is None:
                raise ValueError(f"it has no image or {_missing(self.label_column)}")
            image = decode_image(io.BytesIO(sample[extensions[0]]), self.transform.mode)
            if isinstance(label, str) and label not in self.numbers:
                raise ValueError(
                    f"it has the class {label!r}, which the training images do not have"
                )
            target = self.numbers[label] if isinstance(label, str) else label
            if not 0 <= target < self.num_classes:
                raise ValueError(
                    f"it has the class {target}, and the model has {self.num_classes} classes"
                )
        except UNREADABLE as error:
            return unreadable_error(name, error)
        key = f"{self.epoch} {Path(sample['__url__']).name} {sample['__key__']}"
        return self.transform(image, key), target
