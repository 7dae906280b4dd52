"""One pass: attention in slices, MLP and NLL, with the residual rules.

"Sliced Recursive Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297.

Tensors carry their shape in their name: B batch, N tokens, C channels, G slices, n tokens of a
slice, H heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_cli.spec import ModelSpec

LAYER_NORM_EPS = 1e-6


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop_rate = drop_rate

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Maps each token by itself."""
        hidden = F.dropout(F.gelu(self.fc1(x_BNC)), self.drop_rate, self.training)
        return F.dropout(self.fc2(hidden), self.drop_rate, self.training)


class Attention(nn.Module):
    """Self-attention inside equal groups of consecutive tokens."""

    def __init__(self, width: int, heads: int, drop_rate: float, attn_drop_rate: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop_rate = drop_rate
        self.attn_drop_rate = attn_drop_rate

    def forward(self, x_BNC: Tensor, slices: int, order_N: Tensor | None) -> Tensor:
        """Attends within `slices` groups, of the tokens as they stand or permuted by `order_N`."""
        B, N, C = x_BNC.shape
        if order_N is not None:
            x_BNC = x_BNC.index_select(1, order_N)
        grouped = (B * slices, N // slices, 3, self.heads, C // self.heads)
        q, k, v = self.qkv(x_BNC).view(grouped).permute(2, 0, 3, 1, 4)  # each [B*G, H, n, D]
        x = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.attn_drop_rate if self.training else 0.0
        )
        x_BNC = x.transpose(1, 2).reshape(B, N, C)
        if order_N is not None:
            x_BNC = x_BNC.index_select(1, inverse(order_N))
        return F.dropout(self.proj(x_BNC), self.drop_rate, self.training)


class Block(nn.Module):
    """One set of shared weights: attention and MLP, each with its residual connection."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        width = spec.embed_dims[stage]
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, spec.num_heads[stage], spec.drop_rate, spec.attn_drop_rate)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, spec.hidden(stage, "mlp"), spec.drop_rate)
        self.keep, self.scale = spec.branch_scales(stage)
        self.post_norm = spec.residual == "deepnorm"
        own = spec.residual == "lrc" and spec.lrc == "per_block"
        self.lrc = nn.Parameter(torch.ones(4)) if own else None
        self.scale1, self.scale2 = learned_scale(spec, stage), learned_scale(spec, stage)

    def forward(
        self,
        x_BNC: Tensor,
        slices: int,
        order_N: Tensor | None,
        drop_path_rate: float,
        lrc_4: Tensor | None = None,
    ) -> Tensor:
        """One pass: x = c1*x + c2*Attn(LN(x)), then x = c3*x + c4*MLP(LN(x)).

        The coefficients are the residual rule's (`ModelSpec`); `lrc_4` are a pass's own.
        """
        lrc_4 = self.lrc if lrc_4 is None else lrc_4
        if lrc_4 is not None:
            c1, c2, c3, c4 = lrc_4
        else:
            c1 = c3 = self.keep
            c2 = self.scale if self.scale1 is None else self.scale1
            c4 = self.scale if self.scale2 is None else self.scale2
        rate = drop_path_rate if self.training else 0.0
        if self.post_norm:
            branch = drop_path(self.attn(x_BNC, slices, order_N), rate)
            x_BNC = self.norm1(residual(x_BNC, branch, c1, c2))
            return self.norm2(residual(x_BNC, drop_path(self.mlp(x_BNC), rate), c3, c4))
        branch = self.attn(self.norm1(x_BNC), slices, order_N)
        x_BNC = residual(x_BNC, drop_path(branch, rate), c1, c2)
        branch = self.mlp(self.norm2(x_BNC))
        return residual(x_BNC, drop_path(branch, rate), c3, c4)


class NLL(nn.Module):
    """The non-linear projection layer that keeps repeated passes from degenerating."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        width = spec.embed_dims[stage]
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, spec.hidden(stage, "nll"), spec.drop_rate)
        self.keep, self.scale = spec.branch_scales(stage)
        self.post_norm = spec.residual == "deepnorm"
        self.lrc = nn.Parameter(torch.ones(2)) if spec.residual == "lrc" else None
        self.scale1 = learned_scale(spec, stage)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Returns c1*x + c2*MLP(LN(x))."""
        if self.lrc is not None:
            c1, c2 = self.lrc
        else:
            c1, c2 = self.keep, self.scale if self.scale1 is None else self.scale1
        if self.post_norm:
            return self.norm(residual(x_BNC, self.mlp(x_BNC), c1, c2))
        return residual(x_BNC, self.mlp(self.norm(x_BNC)), c1, c2)


def residual(x: Tensor, branch: Tensor, keep: Tensor | float, scale: Tensor | float) -> Tensor:
    """Returns keep * x + scale * branch; a `keep` of 1.0 costs nothing."""
    kept = x if isinstance(keep, float) and keep == 1.0 else keep * x
    if isinstance(scale, Tensor):
        return torch.addcmul(kept, scale, branch)
    return torch.add(kept, branch, alpha=scale)


def learned_scale(spec: ModelSpec, stage: int) -> nn.Parameter | None:
    """What a branch is multiplied with in `layerscale` and `rezero`; other rules have none."""
    if spec.residual == "rezero":
        return nn.Parameter(torch.zeros(1))
    if spec.residual == "layerscale":  # CaiT, section 3.1 of arXiv 2103.17239
        start = 0.1 if spec.layers <= 18 else 1e-5 if spec.layers <= 24 else 1e-6
        return nn.Parameter(torch.full((spec.embed_dims[stage],), start))
    return None


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """The branch, dropped for a random share of samples and scaled up for the others.

    "Deep Networks with Stochastic Depth", Huang et al., 2016. timm's `drop_path`, which would cost
    its import.
    """
    if rate == 0.0:
        return branch
    keep = torch.empty((len(branch), 1, 1), dtype=branch.dtype, device=branch.device)
    return branch * keep.bernoulli_(1 - rate).div_(1 - rate)


def inverse(order_N: Tensor) -> Tensor:
    """The permutation that undoes another."""
    positions = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, positions)
