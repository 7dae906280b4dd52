"""Linear layers that use oneDNN for large fp32 products on a CPU.

torch uses MKL for these, and MKL uses only AVX2 on processors that are not from Intel. oneDNN uses
AVX-512 wherever the processor has it, which is twice as fast on AMD. torch uses oneDNN for bf16.

`torch.ops.mkldnn._linear_pointwise` is not public; this is the only file that calls it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# From this many multiply-adds on, oneDNN saves more time than the call to it costs.
LEAST_MACS = 2**23
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` by oneDNN, in fp32 on a CPU, without a gradient."""
    call = _opaque_product if torch.compiler.is_compiling() else _onednn_linear
    return call(x, weight, bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# The compiler has a rule for oneDNN's operator that expects constant weights; for this one it has
# none.
@torch.library.custom_op("sret::product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn_linear(x, weight, bias)


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    """`product` and its gradients, which also use `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)
        return (
            product(grad, weight.t()) if needs_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


class Linear(nn.Linear):
    """nn.Linear with a bias that uses oneDNN for large fp32 products on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`."""
        if not self._is_large(x):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)

    def _is_large(self, x: Tensor) -> bool:
        # Traces and exported programs must contain a linear layer, not oneDNN's operator.
        if torch.jit.is_tracing() or torch.compiler.is_exporting() or type(x) is not Tensor:
            return False
        return (
            ONEDNN
            and x.device.type == "cpu"
            and x.numel() * self.out_features >= LEAST_MACS
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )
