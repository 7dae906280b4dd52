"""A pass: one entry of the schedule of a stage.

A stage is a schedule of passes over a bank of blocks. `ModelSpec.schedule` lists the passes as
plain values; models, costs and reports are views of that list.
"""

from typing import NamedTuple


class Pass(NamedTuple):
    """One execution of a block: what one layer of the network is.

    Only sliced attention depends on the order of tokens. So tokens stay in the order that a
    shuffled pass has put them in, until a pass needs another one.

    Attributes:
        block: number of the block in its stage, from 0.
        visit: number of passes through the same block before this one.
        nll: number of the NLL that follows the pass, or None.
        slices: groups of tokens that attention is confined to.
        shuffled: whether the pass needs its tokens in a permuted order.
        gathers: whether tokens are put into another order first: a permutation, or after a
            shuffled pass the original order.
    """

    block: int
    visit: int
    nll: int | None
    slices: int
    shuffled: bool
    gathers: bool


def ends_shuffled(schedule: tuple[Pass, ...]) -> bool:
    """Whether a stage has to restore the original order of its tokens after its last pass."""
    last = next((p for p in reversed(schedule) if p.gathers), None)
    return last is not None and last.shuffled
