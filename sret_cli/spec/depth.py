"""The recursions that give a number of layers, and divisors for slices."""

from sret_cli.runtime.errors import SretError

MAX_LAYERS = 100_000


def recursions_for(
    layers: int, blocks: tuple[int, ...], recursions: tuple[int, ...]
) -> tuple[int, ...]:
    """Recursions of each stage that give exactly `layers`, in proportion to those given.

    For one stage after the other it takes the number nearest to the proportion with which the later
    stages can still reach the total.

    Raises:
        SretError: no recursions give `layers`; the message names the nearest numbers that work.
    """
    fewest = sum(blocks)
    if layers < 1:
        raise SretError(f"{layers} layers: use {fewest} or more, one pass for each block")
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
    """For each stage s, a number whose bit n is set if stages s and later can have n layers."""
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
