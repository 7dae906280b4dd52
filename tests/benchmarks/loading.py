"""Images per second of our loader beside timm's `create_loader`, with the same transforms.

    python tests/benchmarks/loading.py [--images 384] [--rounds 7] [--workers 2]

Makes JPEG photographs of ImageNet's typical size (500x375, quality 90) out of crops of the two that
come with scikit-learn, and loads them at 224 px with random crops and flips, up to normalised
float32 batches of 64 on the CPU. Rounds of the two alternate; each round is one epoch, after one
that is not timed. Prints the median of each and the ratio's median and quartiles.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader
from torch import Tensor

from sret_cli.data.prepare import load_data
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.train import TrainSpec

BATCH_SIZE = 64
AUGMENT = {"scale": (0.08, 1.0), "interpolation": "bicubic", "hflip": 0.5}

Epoch = Callable[[int], Iterator[Tensor]]


def write_photographs(folder: Path, count: int) -> None:
    """Writes that many JPEG files in two classes, and a test image of each."""
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % 2]
        width = int(generator.integers(320, 620))
        height = width * 3 // 4
        left = int(generator.integers(photograph.width - width))
        top = int(generator.integers(max(photograph.height - height, 1)))
        crop = photograph.crop((left, top, left + width, top + height)).resize((500, 375))
        for split in ("train", "test") if number < 2 else ("train",):
            (folder / split / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
            crop.save(folder / split / f"class{number % 2}" / f"{number}.jpg", quality=90)


def ours(folder: Path, workers: int, augment: str | None) -> Epoch:
    """Our loader's normalised batches of an epoch."""
    spec = TrainSpec(data_dir=str(folder), batch_size=BATCH_SIZE, auto_augment=augment, **AUGMENT)
    loader, _ = load_data(spec, PRESETS["sret_t"], workers)
    return lambda epoch: (loader.normalize(x) for x, _ in loader.epoch(epoch))


def timms(folder: Path, workers: int, augment: str | None) -> Epoch:
    """The same of timm's."""
    loader = create_loader(
        create_dataset("", str(folder), split="train", is_training=True),
        (3, 224, 224),
        BATCH_SIZE,
        is_training=True,
        color_jitter=None,
        auto_augment=augment,
        num_workers=workers,
        device=torch.device("cpu"),
        **AUGMENT,
    )
    return lambda epoch: (x for x, _ in loader)


def images_per_second(epoch: Epoch, number: int) -> float:
    """The speed of one epoch."""
    start, images = time.perf_counter(), 0
    for x in epoch(number):
        assert x.shape[1:] == (3, 224, 224) and x.dtype == torch.float32
        images += len(x)
    return images / (time.perf_counter() - start)


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--auto-augment", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_photographs(folder, options.images)
        epochs = {
            make.__name__: make(folder, options.workers, options.auto_augment)
            for make in (ours, timms)
        }
        speeds: dict[str, list[float]] = {name: [] for name in epochs}
        for number in range(options.rounds + 1):
            for name in list(epochs) if number % 2 else list(epochs)[::-1]:
                speed = images_per_second(epochs[name], number)
                speeds[name] += [speed] if number else []
    for name, values in speeds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        print(f"{name}: {median:.0f} images/s (quartiles {low:.0f} to {high:.0f})")
    ratios = np.array(speeds["ours"]) / np.array(speeds["timms"])
    low, median, high = np.percentile(ratios, (25, 50, 75))
    print(f"ratio: {median:.3f} (quartiles {low:.3f} to {high:.3f}, {options.rounds} rounds)")
    print(
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
        f"{options.workers} workers, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
