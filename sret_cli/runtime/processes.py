"""The processes of one training: which of them this is, and its share of a batch."""

import os


def rank_and_world_size() -> tuple[int, int]:
    """This process's number, and how many torchrun or Slurm started, by the variables they set."""
    torchrun = "WORLD_SIZE" in os.environ  # also inside of Slurm
    names = ("RANK", "WORLD_SIZE") if torchrun else ("SLURM_PROCID", "SLURM_NTASKS")
    rank, count = int(os.environ.get(names[0], 0)), int(os.environ.get(names[1], 1))
    return (rank, count) if count > 1 else (0, 1)


def is_leader() -> bool:
    """Whether this process is the one that talks to the user: the first, or the only one."""
    return rank_and_world_size()[0] == 0


def places_of_rank(size: int, rank: int, world_size: int, parts: int = 1) -> list[int]:
    """A rank's places in a batch, in their order: two runs of them that mirror each other.

    So the pairs that mixup mixes, the first with the last and so on, are not torn apart. Where so
    many ranks do not halve a batch, a rank has one run. The ranks share each of the `parts` of a
    batch, of equal size, which a rank takes one after another.
    """
    if parts > 1:
        part = places_of_rank(size // parts, rank, world_size)
        return [number * (size // parts) + place for number in range(parts) for place in part]
    if size % (2 * world_size):
        return list(range(size * rank // world_size, size * (rank + 1) // world_size))
    half = size // (2 * world_size)
    first = range(half * rank, half * (rank + 1))
    return [*first, *(size - 1 - place for place in reversed(first))]
