"""The places of a timm model's parameters from input to output, for layer decay."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn


class _Names(NamedTuple):
    """Names of parameters, as timm's `group_parameters` reads them from a module."""

    names: list[str]

    def named_parameters(self) -> Iterator[tuple[str, str]]:
        return ((name, name) for name in self.names)


def place_parameters(
    model: nn.Module,
    sequences: tuple[str, ...],
    block_of_nll: dict[str, str],
    coarse: bool = False,
) -> Callable[[str], int]:
    """A function from a parameter's name to its place: 0 is the stem, the largest is the head.

    An NLL has the place of its block, whichever passes it follows. All other parameters have the
    place that timm's own matcher gives them, with one exception: parameters before the blocks that
    timm puts with the head (a table of positions that all blocks read) go with the stem. A model
    without a matcher (PiT) has one place for each block, together with the pool before it.

    Args:
        model: a timm model, with or without NLLs.
        sequences: the names of its sequences of blocks.
        block_of_nll: for the name of each NLL, the name of the block that it follows.
        coarse: as in timm: one place for each stage, if timm's matcher supports that.
    """
    from timm.models import group_parameters

    nll = re.compile(rf"({'|'.join(map(re.escape, sequences))})\.nlls\.\d+")
    names = [name for name, _ in model.named_parameters() if not nll.match(name)]
    block = re.compile(rf"({'|'.join(map(re.escape, sequences))})\.\d+(?=\.)")
    blocks = {name: found[0] for name in names if (found := block.match(name))}
    matcher = getattr(type(model), "group_matcher", None)
    if matcher is None:
        places = _in_order(names, blocks)
    else:
        places = group_parameters(_Names(names), matcher(model, coarse), reverse=True)
    last = max(places[name] for name in blocks)
    for name in names[: names.index(next(iter(blocks)))]:
        if places[name] > last:
            places[name] = 0
    of_block = {blocks[name]: places[name] for name in blocks}

    def place(name: str) -> int:
        found = nll.match(name)
        return places[name] if found is None else of_block[block_of_nll[found[0]]]

    return place


def _in_order(names: list[str], blocks: dict[str, str]) -> dict[str, int]:
    """Places by the order of the names: the stem, each block with its pool, the head."""
    order = {block: number for number, block in enumerate(dict.fromkeys(blocks.values()), 1)}
    places, place = {}, len(order) + 1
    for name in reversed(names):
        place = order[blocks[name]] if name in blocks else place
        places[name] = place
    for name in names[: names.index(next(iter(blocks)))]:
        places[name] = 0
    return places
