"""What a call of a module holds in memory at which time, at any batch size.

Two batch sizes are traced on shapes without data (`cost.storages`); the bytes of each storage grow
linearly between and beyond them. Memory that kernels allocate inside an operator is not seen.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from sret_cli.cost.storages import CAST, GRADIENT, Call, Events, StorageLog

BATCHES = (2, 3)  # batch sizes that are traced
ALIGNMENT = {"cpu": 1, "cuda": 512}  # bytes; CUDA's allocator hands out multiples of 512


class Usage(NamedTuple):
    """Bytes that a call takes at one batch size; copies of weights in bf16 count only in `casts`.

    Attributes:
        input: bytes of the input.
        output: bytes of the output.
        kept: bytes kept from the forward to the backward pass: the input where that is kept, but
            not the output.
        kept_input: bytes of the input where it is kept, else 0.
        casts: for each weight that is copied: its name, bytes of the copy, and those of them that
            are kept for the backward pass.
        forward_peak: most bytes during the forward pass, including the input.
        backward_peak: most bytes during the backward pass, including what is kept and the incoming
            gradient, but no gradients of weights.
        weight_gradient: bytes of the largest gradient of a weight.
        inference_peak: most bytes of the forward pass without a graph; from another trace.
    """

    input: int
    output: int
    kept: int
    kept_input: int
    casts: tuple[tuple[str, int, int], ...]
    forward_peak: int
    backward_peak: int
    weight_gradient: int
    inference_peak: int = 0


@dataclass(frozen=True)
class Trace:
    """When a call allocates and releases its storages, and how they grow with the batch.

    Attributes:
        sizes: for each storage, its fixed bytes and its bytes per image.
        kinds: for each storage, PLAIN, CAST or GRADIENT.
        weights: for each storage, the name of the weight that it is a copy of, or "".
        forward: events of the forward pass.
        backward: events of the backward pass.
        input: number of the input's storage; None where its bytes do not count.
        output: number of the output's storage.
        output_dtype: type of the output.
        alignment: bytes; storages are rounded up to multiples of it.
    """

    sizes: tuple[tuple[int, int], ...]
    kinds: tuple[int, ...]
    weights: tuple[str, ...]
    forward: Events
    backward: Events
    input: int | None
    output: int
    output_dtype: torch.dtype
    alignment: int

    def peak_at(self, batch_size: int) -> int:
        """The most bytes of the forward pass at a batch size, with copies of weights in bf16."""
        return _peak(self.forward, self._sizes_at(batch_size), 0)[1]

    def _sizes_at(self, batch_size: int) -> list[int]:
        return [
            align_up(fixed + batch_size * per_image, self.alignment)
            for fixed, per_image in self.sizes
        ]

    def at(self, batch_size: int) -> Usage:
        """The bytes that the call takes at a batch size."""
        sizes = self._sizes_at(batch_size)
        plain = [0 if kind else size for size, kind in zip(sizes, self.kinds, strict=True)]
        alive, forward_peak = _peak(self.forward, plain, 0)
        output = sizes[self.output]
        gone = self.input is None or (self.input, -1) in self.forward
        _, backward_peak = _peak(self.backward, plain, alive)
        casts = [
            (self.weights[number], size, 0 if (number, -1) in self.forward else size)
            for number, size in enumerate(sizes)
            if self.kinds[number] == CAST
        ]
        gradients = [s for s, kind in zip(sizes, self.kinds, strict=True) if kind == GRADIENT]
        return Usage(
            input=0 if self.input is None else sizes[self.input],
            output=output,
            kept=alive - output,
            kept_input=0 if gone or self.input is None else sizes[self.input],
            casts=tuple(casts),
            forward_peak=forward_peak,
            backward_peak=backward_peak,
            weight_gradient=max(gradients, default=0),
        )


def align_up(size: int, alignment: int) -> int:
    """The size rounded up to a multiple of the alignment."""
    return -(-size // alignment) * alignment


def _peak(events: Events, sizes: list[int], alive: int) -> tuple[int, int]:
    """Bytes that are alive after some events, and the most that were alive at once."""
    peak = alive
    for storage, sign in events:
        alive += sign * sizes[storage]
        peak = max(peak, alive)
    return alive, peak


def trace_storages(
    module: nn.Module, call: Call, device: str, precision: str, trains: bool = True
) -> Trace:
    """Traces one call of a module.

    The module has to be made in `fake_module`, and this function has to be called within it.

    Args:
        module: holds the weights.
        call: the part of the module to call, and the batch it takes.
        device: cpu or cuda.
        precision: fp32, or bf16 by autocast.
        trains: whether to run the backward pass too; if not, in eval mode and without a graph.
    """
    module.train(trains)
    one, two = (
        StorageLog(module, device).record(call, batch_size, precision, trains)
        for batch_size in BATCHES
    )
    assert (one.forward, one.backward) == (two.forward, two.backward), "the same at any batch size"
    assert one.output is not None
    step = BATCHES[1] - BATCHES[0]
    slopes = [(b - a) // step for a, b in zip(one.sizes, two.sizes, strict=True)]
    fixed = [a - BATCHES[0] * slope for a, slope in zip(one.sizes, slopes, strict=True)]
    return Trace(
        sizes=tuple(zip(fixed, slopes, strict=True)),
        kinds=tuple(one.kinds),
        weights=tuple(one.weights),
        forward=one.forward,
        backward=one.backward,
        input=one.input,
        output=one.output,
        output_dtype=one.output_dtype,
        alignment=ALIGNMENT[device],
    )
