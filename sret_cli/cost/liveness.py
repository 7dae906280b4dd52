"""Which storages a module's forward and backward pass hold at which time, at any batch size.

The module runs on fake tensors: shapes without data, on a CPU or, without there being one, on CUDA.
Autograd builds its real graph, whose nodes are then called as its engine does: C++'s engine asks
for a device. What only kernels see (workspaces inside an operator) is not seen here. Two batch
sizes are traced; between and beyond them each storage grows linearly.
"""

import heapq
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCHES = (2, 3)  # sizes that are traced
ALIGNMENT = {"cpu": 1, "cuda": 512}  # bytes; CUDA's allocator hands out multiples of 512
PLAIN, CAST, GRADIENT = range(3)  # storages; copies of weights in bf16; gradients of weights
NORMS = (torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_batch_norm.default)

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Usage(NamedTuple):
    """Bytes that a call takes at one batch size; copies of weights in bf16 count as `casts` alone.

    Those are, of each weight: name, bytes, and bytes of them that are kept for the backward pass.
    `kept` are there from the forward to the backward pass, without the output and with the input
    where that is kept (`kept_input`). The peaks hold the input or, in the backward pass, what is
    kept and the gradient that comes in; gradients of weights are in neither. `weight_gradient` is
    the largest of those.
    """

    input: int
    output: int
    kept: int
    kept_input: int
    casts: tuple[tuple[str, int, int], ...]
    forward_peak: int
    backward_peak: int
    weight_gradient: int
    inference_peak: int = 0  # of the forward pass without a graph; known from another trace


@dataclass(frozen=True)
class Trace:
    """The births and deaths of storages in a call, and how their bytes grow with the batch."""

    sizes: tuple[tuple[int, int], ...]  # of each storage: bytes without images, and for each image
    kinds: tuple[int, ...]
    weights: tuple[str, ...]  # of which each storage is a copy, if any
    forward: tuple[tuple[int, int], ...]  # storage, and 1 for its birth or -1 for its death
    backward: tuple[tuple[int, int], ...]
    input: int | None
    output: int
    output_dtype: torch.dtype
    alignment: int

    def peak_at(self, batch_size: int) -> int:
        """The most that the forward pass holds at a batch size, with copies of weights in bf16."""
        return _peak(self.forward, self._sizes_at(batch_size), 0)[1]

    def _sizes_at(self, batch_size: int) -> list[int]:
        align = self.alignment
        return [-(-(a + b * batch_size) // align) * align for a, b in self.sizes]

    def at(self, batch_size: int) -> Usage:
        """What the call takes at a batch size."""
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


def _peak(events: tuple[tuple[int, int], ...], sizes: list[int], alive: int) -> tuple[int, int]:
    """What is alive after some events, and the most that ever was."""
    peak = alive
    for storage, sign in events:
        alive += sign * sizes[storage]
        peak = max(peak, alive)
    return alive, peak


@contextmanager
def fake_module(device: str) -> Iterator[None]:
    """Modules made and called in here have shapes and no data, on a device that need not exist."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        yield


def trace_storages(
    module: nn.Module,
    forward: Forward,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    device: str,
    precision: str,
    loss: bool = False,
    is_image: bool = False,
    trains: bool = True,
) -> Trace:
    """Traces one call of a module that was made in `fake_module`, inside of it.

    Args:
        module: what holds the weights.
        forward: is called with the module, a batch, and ones `[2, B, 1, 1]` that do not count.
        shape: of one sample of the batch.
        dtype: of the batch.
        device: cpu or cuda.
        precision: fp32 or bf16, by autocast.
        loss: puts the cross-entropy of training on the output.
        is_image: the batch needs no gradient, and its own bytes do not count.
        trains: also goes backward; else in eval mode and without a graph.
    """
    module.train(trains)
    logs = [
        _Log(module, device).run(forward, (size, *shape), dtype, precision, loss, is_image, trains)
        for size in BATCHES
    ]
    (one, two), step = logs, BATCHES[1] - BATCHES[0]
    assert (one.forward, one.backward) == (two.forward, two.backward), "alike at any batch size"
    slopes = [(b - a) // step for a, b in zip(one.sizes, two.sizes, strict=True)]
    fixed = [a - BATCHES[0] * slope for a, slope in zip(one.sizes, slopes, strict=True)]
    assert one.output is not None
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


class _Log(TorchDispatchMode):
    """Sees every operator of one call; storages get numbers in the order of their birth."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module, self.device = module, device
        self.sizes: list[int] = []
        self.kinds: list[int] = []
        self.weights: list[str] = []
        self.events: list[tuple[int, int]] = []
        self.forward: tuple[tuple[int, int], ...] = ()
        self.backward: tuple[tuple[int, int], ...] = ()
        self.input: int | None = None
        self.output: int | None = None
        self.output_dtype = torch.float32
        tensors = (*module.parameters(), *module.buffers())
        self.names = {p.untyped_storage()._cdata: name for name, p in module.named_parameters()}
        self.own = {t.untyped_storage()._cdata for t in tensors}
        self.numbers: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:
            return output
        if function in NORMS:  # a fake CPU's means and deviations are of the input's type
            output = (output[0], *(t.to(torch.float32) for t in output[1:]))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                number = self.number(tensor)
                if function is torch.ops.aten._to_copy.default and number is not None:
                    name = self.names.get(args[0].untyped_storage()._cdata)
                    if name is not None:
                        self.kinds[number], self.weights[number] = CAST, name
        return output

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage; None for those that were there before the call."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.own:
            return None
        if address not in self.numbers:
            number = self.numbers[address] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.kinds.append(PLAIN)
            self.weights.append("")
            self.events.append((number, 1))
            weakref.finalize(storage, self._gone, address, number)
        return self.numbers[address]

    def _gone(self, address: int, number: int) -> None:
        del self.numbers[address]
        self.events.append((number, -1))

    def run(
        self,
        forward: Forward,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        precision: str,
        loss: bool,
        is_image: bool,
        trains: bool,
    ) -> "_Log":
        """One call, forth and back."""
        leaf = torch.empty(shape, dtype=dtype, requires_grad=trains and not is_image)
        target = torch.empty(shape[0], dtype=torch.long)
        ones_2B11 = torch.ones(2, shape[0], 1, 1)
        self.own |= {t.untyped_storage()._cdata for t in (leaf, target, ones_2B11)}
        kept: dict[int, Tensor] = {}
        used: list[int] = []

        def pack(tensor: Tensor) -> int:
            kept[len(kept)] = tensor  # nothing leaves before the forward pass is over
            return len(kept) - 1

        def unpack(handle: int) -> Tensor:
            used.append(handle)
            return kept[handle]

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        with _Attention(self.device), torch.inference_mode(not trains), hooks, self:
            x = leaf if is_image else leaf.clone()
            self.input = self.number(x)
            with _autocast(self.device, precision):
                output = forward(self.module, x, ones_2B11)
            del x
            if loss and output.shape[1:].numel():
                output = F.cross_entropy(output.float(), target, label_smoothing=0.1)
            self.output, self.output_dtype = self.number(output), output.dtype
            self.forward = tuple(self.events)
            if trains:
                root, shape = output.grad_fn, output.shape
                del output
                gradients: list[Tensor | None] = [torch.empty(shape, dtype=self.output_dtype)]
                with torch.no_grad():
                    for _ in _backward(root, gradients, self._leaf_gradient):
                        for handle in used:
                            kept.pop(handle, None)
                        used.clear()
            self.backward = tuple(self.events[len(self.forward) :])
        return self

    def _leaf_gradient(self, leaf: Tensor, gradient: Tensor) -> None:
        number = self.number(gradient)
        if number is not None and isinstance(leaf, nn.Parameter):
            self.kinds[number] = GRADIENT


def _backward(
    root: Any, gradients: list[Tensor | None], on_leaf: Callable[[Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls the nodes of a graph in the order of autograd's engine; pauses after each.

    Nodes made last come first; gradients of leaves are taken in as soon as they are whole.
    """
    waits: dict[Any, int] = {}
    found, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waits[node] = waits.get(node, 0) + 1
                if node not in found:
                    found.add(node)
                    stack.append(node)
    inputs: dict[Any, list[Tensor | None]] = {root: gradients}
    leaves, ready, ties = [], [(0, 0, 0, root)], count()
    while ready:
        node = heapq.heappop(ready)[-1]
        given = inputs.pop(node)
        if hasattr(node, "variable"):
            if given[0] is not None:
                on_leaf(node.variable, given[0])
                leaves.append(given[0])
            continue
        results = node(*given)
        results = list(results) if isinstance(results, tuple) else [results]
        given.clear()
        yield
        for position, (following, slot) in enumerate(node.next_functions):
            if following is None:
                continue
            buffers = inputs.setdefault(following, [None] * len(following._input_metadata))
            gradient, results[position] = results[position], None
            if gradient is not None:
                gradient = _fit(gradient, following._input_metadata[slot])
                buffers[slot] = _sum(buffers[slot], gradient, inputs)
            del gradient
            waits[following] -= 1
            if not waits[following]:
                is_inner = not hasattr(following, "variable")
                key = (is_inner, -following._sequence_nr(), next(ties))
                heapq.heappush(ready, (*key, following))


def _fit(gradient: Tensor, wanted: Any) -> Tensor:
    """The gradient in the shape and type of what it belongs to."""
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient.to(wanted.dtype)


def _sum(old: Tensor | None, gradient: Tensor, inputs: dict[Any, list[Tensor | None]]) -> Tensor:
    """The sum of two gradients: in place, unless something else waits for the same memory."""
    if old is None:
        return gradient
    storage = old.untyped_storage()._cdata
    waiting = [t for buffers in inputs.values() for t in buffers if t is not None]
    if sum(t.untyped_storage()._cdata == storage for t in waiting) > 1:
        return old + gradient
    return old.add_(gradient)


@contextmanager
def _autocast(device: str, precision: str) -> Iterator[None]:
    """As `torch.autocast`, which refuses a device that is not there."""
    if precision == "fp32":
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if not torch.autocast_decrement_nesting():
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


class _Attention(TorchFunctionMode):
    """Calls the kernel of fused attention that the device would take; a fake one takes none.

    On CUDA that is flash attention for bf16, with heads padded to a multiple of 8, and for fp32 the
    memory-efficient kernel, where heads are a multiple of 4 wide, else plain matrix products
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of PyTorch).
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            dtype = torch.get_autocast_dtype(self.device)
            casts = torch.is_autocast_enabled(self.device)
            torch.set_autocast_enabled(self.device, False)
            try:
                qkv = [t.to(dtype) if casts else t for t in args]
                return self.attend(*qkv, **(kwargs or {}))
            finally:
                torch.set_autocast_enabled(self.device, casts)
        return function(*args, **(kwargs or {}))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Attention without a mask."""
        aten, width = torch.ops.aten, q.shape[-1]
        if self.device == "cpu":
            if dropout_p:
                return aten._scaled_dot_product_attention_math(q, k, v, None, dropout_p)[0]
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        if q.dtype == torch.float32:
            if width % 4:
                return aten._scaled_dot_product_attention_math(q, k, v, None, dropout_p)[0]
            return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p)[0]
        q, k, v = (F.pad(t, (0, -width % 8)) if width % 8 else t for t in (q, k, v))
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0][..., :width]
