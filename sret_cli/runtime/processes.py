"""The processes of one training: the rank of this one, and its places in a batch."""

import os


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes, from the variables of torchrun or Slurm."""
    torchrun = "WORLD_SIZE" in os.environ  # takes precedence inside a Slurm job
    names = ("RANK", "WORLD_SIZE") if torchrun else ("SLURM_PROCID", "SLURM_NTASKS")
    rank, count = int(os.environ.get(names[0], 0)), int(os.environ.get(names[1], 1))
    return (rank, count) if count > 1 else (0, 1)


def is_leader() -> bool:
    """Whether this process writes files and prints: rank 0, or the only process."""
    return rank_and_world_size()[0] == 0


def places_of_rank(size: int, rank: int, world_size: int, parts: int = 1) -> list[int]:
    """A rank's places in a batch, in order.

    Mixup mixes the first image with the last and so on. To keep these pairs on one rank, a rank has
    two ranges of places that mirror each other. If twice the ranks do not divide the batch, it has
    one range. With several `parts` (accumulation), each part is divided in this way.
    """
    if parts > 1:
        part = places_of_rank(size // parts, rank, world_size)
        return [number * (size // parts) + place for number in range(parts) for place in part]
    if size % (2 * world_size):
        return list(range(size * rank // world_size, size * (rank + 1) // world_size))
    half = size // (2 * world_size)
    first = range(half * rank, half * (rank + 1))
    return [*first, *(size - 1 - place for place in reversed(first))]
