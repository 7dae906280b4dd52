"""The order of samples in an epoch, and how batches are divided among ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Sampler

from sret_cli.runtime.processes import places_of_rank

Key = tuple[int, int, int]  # epoch, index, number of the image's repeat in the epoch


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch is divided into batches, and which rank this process is.

    `batch_size` counts the samples of all ranks. `seed` shuffles; None keeps the order and gives
    each sample once, as for test images. `repeats` is how often an epoch takes each image.
    `accumulation` is the number of equal parts of a batch, which a rank takes one after another.
    """

    batch_size: int
    seed: int | None = None
    repeats: int = 1
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def rank_batch_size(self) -> int:
        """The number of samples in one rank's part of a full batch."""
        return max(self.batch_size // self.world_size, 1)


class Batches(Sampler[list[Key]]):
    """One rank's keys of the batches of an epoch, from batch `start` on.

    With a seed, seed and epoch give the order, and `places_of_rank` divides each batch, so a batch
    has the same images for any number of ranks. The last batch is dropped if it is not full, unless
    it is the only one. The repeats of an image follow each other and do not make an epoch longer,
    as in timm's `RepeatAugSampler`. Without a seed, each rank takes every `world_size`-th sample.
    """

    def __init__(self, samples: int, plan: BatchPlan) -> None:
        self.samples, self.plan = samples, plan
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        if self.plan.seed is None:
            return -(-len(self._unshuffled_indices()) // self.plan.rank_batch_size)
        return max(self.samples // self.plan.batch_size, 1)

    def __iter__(self) -> Iterator[list[Key]]:
        return self._unshuffled() if self.plan.seed is None else self._shuffled(self.plan.seed)

    def _unshuffled_indices(self) -> range:
        return range(self.plan.rank, self.samples, self.plan.world_size)

    def _unshuffled(self) -> Iterator[list[Key]]:
        indices, size = self._unshuffled_indices(), self.plan.rank_batch_size
        for first in range(self.start * size, len(indices), size):
            yield [(self.epoch, index, 0) for index in indices[first : first + size]]

    def _shuffled(self, seed: int) -> Iterator[list[Key]]:
        plan = self.plan
        order = np.random.default_rng((seed, self.epoch)).permutation(self.samples)
        for first in range(self.start * plan.batch_size, self.samples, plan.batch_size):
            places = range(first, min(first + plan.batch_size, self.samples))
            is_full = len(places) == plan.batch_size
            if first and not is_full:
                return
            of_rank = places_of_rank(
                size=len(places),
                rank=plan.rank,
                world_size=plan.world_size,
                parts=plan.accumulation if is_full else 1,
            )
            yield [
                (self.epoch, int(order[place // plan.repeats]), place % plan.repeats)
                for place in (places[offset] for offset in of_rank)
            ]

    def batch_indices(self, epoch: int, number: int) -> list[int]:
        """The indices of the images of one batch, over all ranks."""
        batches = Batches(self.samples, replace(self.plan, rank=0, world_size=1))
        batches.epoch, batches.start = epoch, number
        return [index for _, index, _ in next(iter(batches))]

    @property
    def image_count(self) -> int:
        """The number of images that an epoch takes batches from."""
        return self.samples
