"""A part of the forward pass that is computed again in the backward pass instead of kept.

As `torch.utils.checkpoint` without reentry, for calls that save the same tensors every time: it
checks nothing and keeps a number for each saved tensor, which takes about a tenth less of a
training step where passes are small. Gradients are bitwise those without recomputation, since
autograd's graph is the same and only its saved tensors come later.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _AllThere(Exception):
    """The last saved tensor is there: what follows it need not be computed again."""


def recompute(function: Callable[..., Tensor], x: Tensor, *arguments: Any, draws: bool) -> Tensor:
    """Calls `function(x, *arguments)`; all that it saves for the backward pass is computed again.

    Args:
        function: saves the same tensors for the same arguments.
        x: its input, which says on which device it runs.
        arguments: likewise kept until then.
        draws: it draws random numbers, and is to draw the same again.
    """
    device = x.device.type
    cast: dict[str, Any] = {
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
    state = _random_state(x) if draws else None
    saved, again = 0, list[Tensor | None]()

    def count(_: Tensor) -> int:
        nonlocal saved
        saved += 1
        return saved - 1

    def keep(tensor: Tensor) -> None:
        again.append(tensor.detach())
        if len(again) == saved:
            raise _AllThere

    def compute_again() -> None:
        again.clear()
        before = None if state is None else _random_state(x)
        if state is not None:
            _set_random_state(x, state)
        try:
            hooks = saved_tensors_hooks(keep, lambda _: x)
            with torch.enable_grad(), torch.autocast(device, **cast), hooks:
                function(x, *arguments)
        except _AllThere:
            pass
        finally:
            if before is not None:
                _set_random_state(x, before)
        assert len(again) == saved, "a recomputation saves what the first computation saved"

    def fetch(number: int) -> Tensor:
        if not again or again[number] is None:
            compute_again()
        tensor, again[number] = again[number], None
        assert tensor is not None
        return tensor

    with saved_tensors_hooks(count, fetch):
        return function(x, *arguments)


def _random_state(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The state of the CPU's generator, and of the GPU's where `x` is on one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None


def _set_random_state(x: Tensor, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], x.device)
