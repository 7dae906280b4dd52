"""Depths that stages of shared blocks can reach, and slices that fit their tokens."""

from sret_cli.runtime.errors import SretError

MAX_LAYERS = 100_000


def recursions_for(
    layers: int, blocks: tuple[int, ...], recursions: tuple[int, ...]
) -> tuple[int, ...]:
    """Recursions of each stage, in proportion to those given, that make exactly so many layers.

    Stage by stage it takes the count nearest to proportion from which the rest can still be met.

    Raises:
        SretError: no recursions reach `layers`; the message names the nearest counts that can be.
    """
    fewest = sum(blocks)
    if layers < 1:
        raise SretError(f"{layers} layers: a model has at least {fewest} here, one pass a block")
    if layers > MAX_LAYERS:
        raise SretError(
            f"{layers:,} layers are more than the {MAX_LAYERS:,} that sret builds; use fewer"
        )
    reach = reachable(blocks, min(layers + 2 * fewest, MAX_LAYERS))
    if not reach[0] >> layers & 1:
        near = [n for n in range(layers - 1, fewest - 1, -1) if reach[0] >> n & 1][:1]
        near += [n for n in range(layers + 1, reach[0].bit_length()) if reach[0] >> n & 1][:1]
        raise SretError(
            f"{layers} layers cannot be reached with {'+'.join(map(str, blocks))} blocks; "
            f"use {' or '.join(map(str, near))}"
        )
    now = sum(b * r for b, r in zip(blocks, recursions, strict=True))
    found, left = [], layers
    for stage, count in enumerate(blocks):
        goal, rest = recursions[stage] * layers / now, reach[stage + 1]
        fits = [r for r in range(1, left // count + 1) if rest >> (left - r * count) & 1]
        found.append(min(fits, key=lambda r: (abs(r - goal), r)))
        left -= found[-1] * count
    return tuple(found)


def reachable(blocks: tuple[int, ...], most: int) -> list[int]:
    """Bit n of item s says that stages s and later can have n layers together, up to `most`."""
    reach = [1]
    for count in reversed(blocks):
        bits, shift = reach[0] << count, count
        while shift <= most:
            bits |= bits << shift
            bits &= (1 << (most + 1)) - 1
            shift *= 2
        reach.insert(0, bits)
    return reach


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
