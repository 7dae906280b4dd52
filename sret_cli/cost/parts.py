"""Parts of an SReT as modules of their own, so that each can be traced alone."""

import torch
from torch import Tensor, nn

from sret_cli.model.blocks import NLL, Block
from sret_cli.model.sret import SReT
from sret_cli.model.stage import one_pass
from sret_cli.spec.model import ModelSpec


class PassPart(nn.Module):
    """One pass through a block and its NLL."""

    order_N: Tensor | None

    def __init__(self, spec: ModelSpec, stage: int, slices: int, gathers: bool) -> None:
        super().__init__()
        spec = spec.with_values(drop_rate=0.0, attn_drop_rate=0.0)
        self.block = Block(spec, stage)
        self.nll = NLL(spec, stage) if spec.nll != "none" else None
        per_pass = spec.residual == "lrc" and spec.lrc == "per_pass"
        self.lrc_4 = nn.Parameter(torch.ones(4)) if per_pass else None
        self.slices = slices
        _hold_order(self, spec, stage, gathers)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens after the pass."""
        return one_pass(self.block, self.nll, self.slices, x_BNC, self.order_N, lrc_4=self.lrc_4)


class ReturnPart(nn.Module):
    """The gather that restores the order of a stage's tokens after a shuffled last pass."""

    order_N: Tensor

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        _hold_order(self, spec, stage, True)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens in their own order."""
        return x_BNC.index_select(1, self.order_N)


def _hold_order(module: nn.Module, spec: ModelSpec, stage: int, gathers: bool) -> None:
    order_N = torch.arange(spec.tokens[stage]) if gathers else None
    if spec.shuffle == "fixed":  # the order is a buffer, and not kept for the backward pass
        module.register_buffer("order_N", order_N)
    else:
        module.__dict__["order_N"] = order_N


class HeadPart(nn.Module):
    """Norm and classifier, as `SReT.forward_head` applies them."""

    forward = SReT.forward_head

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.embed_dims[-1]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.num_classes) if spec.num_classes else nn.Identity()
