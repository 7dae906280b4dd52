"""Notes about settings with an effect that a user may not expect, shown before the first step."""

import math

from sret_cli.data.loader import Loader
from sret_cli.spec.train import TrainSpec

INITIAL_FRACTION = 0.01  # no note where averaged weights have at most this of the initial ones


def training_notes(spec: TrainSpec, loader: Loader) -> list[str]:
    """Lines about a batch that is never full, images that are left out, and too slow an average.

    A stream starts again to fill its batches, and has no repeats.
    """
    notes = []
    images = loader.batches.image_count
    if images is not None:
        notes = [_unfilled_batch(spec, images), _left_out(spec, images, len(loader))]
    notes.append(_initial_average(spec, spec.epochs * len(loader)))
    return [note for note in notes if note is not None]


def _unfilled_batch(spec: TrainSpec, images: int) -> str | None:
    if images >= spec.batch_size:
        return None
    return (
        f"batch_size = {spec.batch_size:,} is never full: there are {images:,} training images, so "
        f"each step takes {images:,}, but lr = {spec.lr:g} is for {spec.batch_size:,}; use a "
        f"batch_size of {images:,} or less"
    )


def _left_out(spec: TrainSpec, images: int, steps: int) -> str | None:
    taken = -(-min(steps * spec.batch_size, images) // max(spec.aug_repeats, 1))
    if spec.aug_repeats < 2 or taken == images:
        return None
    return (
        f"aug_repeats = {spec.aug_repeats}: each epoch takes {taken:,} of the {images:,} images, "
        f"{spec.aug_repeats} times each, and leaves out the other {images - taken:,}; they are "
        "drawn again in each epoch"
    )


def _initial_average(spec: TrainSpec, steps: int) -> str | None:
    left = spec.model_ema_decay**steps
    if spec.model_ema_warmup or left <= INITIAL_FRACTION:
        return None
    fits = math.floor(INITIAL_FRACTION ** (1 / steps) * 1e5) / 1e5
    return (
        f"model_ema_decay = {spec.model_ema_decay:g}: after all {steps:,} steps the averaged "
        f"weights are still {100 * left:.4g} % initial weights; use {fits:g} or less, or set "
        "train.model_ema_warmup=true"
    )
