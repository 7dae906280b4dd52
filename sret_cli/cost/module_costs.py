"""What one call of any module costs, by fvcore and autograd. All use of fvcore is in this file.

fvcore has no rule for fused attention, so one is registered here: both of its matrix products.
"""

import re
import warnings
from collections import Counter
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sret_cli.cost.breakdown import Counts
from sret_cli.cost.parts import HeadPart, PassPart
from sret_cli.model.sret import Pool, Stem, parameter_count
from sret_cli.runtime.errors import SretError

with warnings.catch_warnings():  # fvcore uses torch.jit, which is deprecated
    warnings.simplefilter("ignore")
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

# Operators that compute matrix products; without a rule for one of them the total would be wrong.
PRODUCT = re.compile(r"mm_?$|mv_?$|matmul|conv|dot|attention|einsum|linear|lstm|gru|rnn|cdist|fft")


def count_module(module: nn.Module, x: Tensor) -> Counts:
    """Costs of one call of any module, by a full fvcore trace in eval mode.

    Args:
        module: the module to trace; it stays in its mode.
        x: its input, a batch of one.

    Raises:
        SretError: an operator that computes matrix products has no rule.
    """
    training = module.training
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns that shapes become constants, as intended
        flops = _quiet(FlopCountAnalysis(module, x))
        flops.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        by_operator = flops.by_module_and_operator()
        _check_rules(flops.unsupported_ops())
        activations = _quiet(ActivationCountAnalysis(module, x))
        activations.set_op_handle("aten::scaled_dot_product_attention", _output_elements)
        total_activations = int(activations.total())
    module.train()
    kept = _kept_of_one_image(module, x)
    module.train(training)
    return Counts(
        params=parameter_count(module),
        macs_by_kind=tuple(_by_kind(module, by_operator).items()),
        activations=total_activations,
        activation_bytes=kept,
    )


def _quiet(analysis: Any) -> Any:
    analysis.unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    return analysis


def _check_rules(unsupported: Counter[str]) -> None:
    for name in unsupported:
        space, _, operator = name.partition("::")
        if space not in ("aten", "prim") or PRODUCT.search(operator):
            raise SretError(
                f"no rule counts the multiply-adds of {name}, so the total would be too small; "
                "register one in count_module of sret_cli/cost/module_costs.py"
            )


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of Q @ K^T and of the scores @ V."""
    q, k, v = (tensor.type().sizes() for tensor in inputs[:3])
    scores = q[-2] * k[-2]
    return prod(q[:-2]) * scores * (q[-1] + v[-1])


def _output_elements(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(outputs[0].type().sizes())


def _by_kind(module: nn.Module, by_operator: dict[str, Counter[str]]) -> Counter[str]:
    """A traced part's multiply-adds by `KINDS`; those of any other module by operator."""
    kind = {Stem: "stem", Pool: "pools", HeadPart: "head"}.get(type(module))
    if kind:
        return Counter({kind: int(sum(by_operator[""].values()))})
    if not isinstance(module, PassPart):
        return Counter({operator: int(macs) for operator, macs in by_operator[""].items()})
    inside = {name: int(sum(by_operator[name].values())) for name in by_operator}
    attention = int(by_operator["block.attn"]["scaled_dot_product_attention"])
    kinds = Counter(
        {
            "attention products": attention,
            "projections": inside["block.attn"] - attention,
            "mlp": inside["block.mlp"],
            "nll": inside.get("nll", 0),
        }
    )
    kinds["norms"] = inside[""] - kinds.total()
    return kinds


def _kept_of_one_image(module: nn.Module, x: Tensor) -> int:
    try:
        return saved_bytes(module, x)
    except ValueError as error:  # BatchNorm of one value: take what a third image adds to two
        if "more than 1 value per channel" not in str(error):
            raise
        two, three = (saved_bytes(module, x.repeat(n, 1, 1, 1)) for n in (2, 3))
        return three - two


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of one call, in the module's current mode.

    Every storage counts once and in full; parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = [b.clone() for b in module.buffers()]  # BatchNorm's statistics are restored below
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = module(x.clone().requires_grad_())
    del output  # the graph held every storage until here, so no address was used twice
    with torch.no_grad():
        for buffer, old in zip(module.buffers(), state, strict=True):
            buffer.copy_(old)
    return sum(kept.values())
