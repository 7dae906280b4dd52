"""Records which storages one call of a module allocates and releases, and in which order.

The module runs on fake tensors: shapes without data, on a CPU or on CUDA, which need not exist.
Autograd builds its real graph. Its nodes are then called here in the order of autograd's engine,
because the C++ engine needs a real device.

Nearly all private API of torch that the package uses is in this file; `tests/cost/
test_private_torch.py` has a test for each use.
"""

import heapq
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kinds of storages: copies of weights in bf16, gradients of weights, and all others.
PLAIN, CAST, GRADIENT = range(3)
NORMS = (torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_batch_norm.default)

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]
Events = tuple[tuple[int, int], ...]  # storage, and 1 for its allocation or -1 for its release


@dataclass(frozen=True)
class Call:
    """A call of a part of a network, for any batch size.

    Attributes:
        forward: takes the module, a batch, and ones `[2, B, 1, 1]` whose bytes do not count.
        shape: shape of one sample of the batch.
        dtype: type of the batch.
        is_image: whether the batch needs no gradient, and its own bytes do not count.
        has_loss: whether the cross-entropy of training follows the output.
    """

    forward: Forward
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_image: bool = False
    has_loss: bool = False


@contextmanager
def fake_module(device: str) -> Iterator[None]:
    """Makes modules within have shapes and no data, on a device that need not exist."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        yield


class StorageLog(TorchDispatchMode):
    """Numbers the storages of one call in the order of their allocation.

    Attributes:
        sizes: bytes of each storage.
        kinds: PLAIN, CAST or GRADIENT of each storage.
        weights: the name of the weight that each storage is a copy of, or "".
        forward: events of the forward pass.
        backward: events of the backward pass.
        input: number of the input's storage; None for images.
        output: number of the output's storage.
        output_dtype: type of the output.
    """

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module, self.device = module, device
        self.sizes: list[int] = []
        self.kinds: list[int] = []
        self.weights: list[str] = []
        self.forward: Events = ()
        self.backward: Events = ()
        self.input: int | None = None
        self.output: int | None = None
        self.output_dtype = torch.float32
        tensors = (*module.parameters(), *module.buffers())
        self._events: list[tuple[int, int]] = []
        self._names = {_address(p): name for name, p in module.named_parameters()}
        self._ignored = {_address(t) for t in tensors}
        self._numbers: dict[int, int] = {}  # by the address of a storage that is alive

    def record(self, call: Call, batch_size: int, precision: str, trains: bool) -> Self:
        """Runs a call forward and, where it trains, backward."""
        leaf = torch.empty(
            (batch_size, *call.shape), dtype=call.dtype, requires_grad=trains and not call.is_image
        )
        target = torch.empty(batch_size, dtype=torch.long)
        ones_2B11 = torch.ones(2, batch_size, 1, 1)
        self._ignored |= {_address(t) for t in (leaf, target, ones_2B11)}
        saved = _SavedTensors()
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        with _DeviceAttention(self.device), torch.inference_mode(not trains), hooks, self:
            x = leaf if call.is_image else leaf.clone()
            self.input = self._number(x)
            with _autocast(self.device, precision):
                output = call.forward(self.module, x, ones_2B11)
            del x
            if call.has_loss and output.shape[1:].numel():
                output = F.cross_entropy(output.float(), target, label_smoothing=0.1)
            self.output, self.output_dtype = self._number(output), output.dtype
            self.forward = tuple(self._events)
            if trains:
                root, shape = output.grad_fn, output.shape
                del output  # its storage is released where the graph does not keep it
                gradients: list[Tensor | None] = [torch.empty(shape, dtype=self.output_dtype)]
                with torch.no_grad():
                    for _ in run_backward(root, gradients, self._note_leaf_gradient):
                        saved.release_used()
            self.backward = tuple(self._events[len(self.forward) :])
        return self

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:
            return output
        if function in NORMS:  # fake CPU kernels give mean and deviation the input's type
            output = (output[0], *(t.to(torch.float32) for t in output[1:]))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                number = self._number(tensor)
                if function is torch.ops.aten._to_copy.default and number is not None:
                    name = self._names.get(_address(args[0]))
                    if name is not None:
                        self.kinds[number], self.weights[number] = CAST, name
        return output

    def _number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage; None for weights, images and labels."""
        address = _address(tensor)
        if address in self._ignored:
            return None
        if address not in self._numbers:
            storage = tensor.untyped_storage()
            number = self._numbers[address] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.kinds.append(PLAIN)
            self.weights.append("")
            self._events.append((number, 1))
            weakref.finalize(storage, self._note_release, address, number)
        return self._numbers[address]

    def _note_release(self, address: int, number: int) -> None:
        del self._numbers[address]
        self._events.append((number, -1))

    def _note_leaf_gradient(self, leaf: Tensor, gradient: Tensor) -> None:
        number = self._number(gradient)
        if number is not None and isinstance(leaf, nn.Parameter):
            self.kinds[number] = GRADIENT


def _address(tensor: Tensor) -> int:
    """The address of a tensor's storage object, which fake tensors have too."""
    return tensor.untyped_storage()._cdata


class _SavedTensors:
    """Tensors that autograd saves; each is released after the node that uses it has run."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.used: list[int] = []

    def pack(self, tensor: Tensor) -> int:
        """Keeps a tensor under a number of its own."""
        self.kept[len(self.kept)] = tensor  # nothing is released before the forward pass ends
        return len(self.kept) - 1

    def unpack(self, handle: int) -> Tensor:
        """The tensor of a number."""
        self.used.append(handle)
        return self.kept[handle]

    def release_used(self) -> None:
        """Releases the tensors that were unpacked since the last call."""
        for handle in self.used:
            self.kept.pop(handle, None)
        self.used.clear()


def run_backward(
    root: Any, gradients: list[Tensor | None], on_leaf: Callable[[Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls the nodes of a graph in the order of autograd's engine; yields after each.

    The node that was made last runs first; a leaf gets its gradient as soon as that is complete.

    Args:
        root: the node of the output.
        gradients: the gradients of the output; the list is emptied.
        on_leaf: called with each leaf and its gradient.
    """
    waits = _incoming_edges(root)
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


def _incoming_edges(root: Any) -> dict[Any, int]:
    """For each node of a graph but the root, the number of edges that lead to it."""
    edges: dict[Any, int] = {}
    found, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                edges[node] = edges.get(node, 0) + 1
                if node not in found:
                    found.add(node)
                    stack.append(node)
    return edges


def _fit(gradient: Tensor, wanted: Any) -> Tensor:
    """The gradient in the shape and type of the tensor that it belongs to."""
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient.to(wanted.dtype)


def _sum(old: Tensor | None, gradient: Tensor, inputs: dict[Any, list[Tensor | None]]) -> Tensor:
    """The sum of two gradients, in place unless something else still needs the same memory."""
    if old is None:
        return gradient
    waiting = [t for buffers in inputs.values() for t in buffers if t is not None]
    if sum(_address(t) == _address(old) for t in waiting) > 1:
        return old + gradient
    return old.add_(gradient)


@contextmanager
def _autocast(device: str, precision: str) -> Iterator[None]:
    """Does what `torch.autocast` does, which refuses a device that does not exist."""
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


class _DeviceAttention(TorchFunctionMode):
    """Calls the kernel of fused attention that the device would choose; a fake one chooses none.

    CUDA chooses flash attention for bf16, with heads padded to a multiple of 8. For fp32 it chooses
    the memory-efficient kernel where the width of heads is a multiple of 4, else plain matrix
    products (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of PyTorch).
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
