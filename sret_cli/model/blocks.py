"""The parts of a pass: attention in slices, MLP and NLL, with the rules of residual sums.

"Sliced Recursive Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297.

Tensors carry their shape in their name: B batch, N tokens, C channels, G slices, n tokens of a
slice, H heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_cli.model.linear import Linear
from sret_cli.spec.model import ModelSpec

LAYER_NORM_EPS = 1e-6

Coefficient = Tensor | float


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.drop_rate = drop_rate

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Maps each token on its own."""
        hidden = dropout(F.gelu(self.fc1(x_BNC)), self.drop_rate, self.training)
        return dropout(self.fc2(hidden), self.drop_rate, self.training)


class Attention(nn.Module):
    """Self-attention inside equal groups of consecutive tokens."""

    def __init__(self, width: int, heads: int, drop_rate: float, attn_drop_rate: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.drop_rate = drop_rate
        self.attn_drop_rate = attn_drop_rate

    def forward(self, x_BNC: Tensor, slices: int) -> Tensor:
        """Attends within each of `slices` groups."""
        B, N, C = x_BNC.shape
        grouped = (B * slices, N // slices, 3, self.heads, C // self.heads)
        q, k, v = self.qkv(x_BNC).view(grouped).permute(2, 0, 3, 1, 4)  # each [B*G, H, n, D]
        x = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.attn_drop_rate if self.training else 0.0
        )
        x_BNC = x.transpose(1, 2).reshape(B, N, C)
        return dropout(self.proj(x_BNC), self.drop_rate, self.training)


class Block(nn.Module):
    """Attention and MLP, each with its residual sum: the weights that several passes use."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        width = spec.embed_dims[stage]
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, spec.num_heads[stage], spec.drop_rate, spec.attn_drop_rate)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, spec.hidden(stage, "mlp"), spec.drop_rate)
        self.keep1, self.scale = spec.branch_scales(stage)
        self.keep2 = self.keep1
        self.post_norm = spec.residual == "deepnorm"
        own = spec.residual == "lrc" and spec.lrc == "per_block"
        self.lrc = nn.Parameter(torch.ones(4)) if own else None
        self.scale1, self.scale2 = learned_scale(spec, stage), learned_scale(spec, stage)

    def forward(
        self,
        x_BNC: Tensor,
        slices: int,
        drop_2B11: Tensor | None = None,
        lrc_4: Tensor | None = None,
    ) -> Tensor:
        """One pass: x = c1*x + c2*Attn(LN(x)), then x = c3*x + c4*MLP(LN(x)).

        The coefficients follow from `ModelSpec.residual`; `lrc_4` holds those of a single pass.
        Drop path multiplies the two branches of each image by `drop_2B11`.
        """
        c1, c2, c3, c4 = self._coefficients(self.lrc if lrc_4 is None else lrc_4)
        if drop_2B11 is not None:
            c2, c4 = c2 * drop_2B11[0], c4 * drop_2B11[1]
        if self.post_norm:
            x_BNC = self.norm1(add_residual(x_BNC, self.attn(x_BNC, slices), c1, c2))
            return self.norm2(add_residual(x_BNC, self.mlp(x_BNC), c3, c4))
        x_BNC = add_residual(x_BNC, self.attn(self.norm1(x_BNC), slices), c1, c2)
        return add_residual(x_BNC, self.mlp(self.norm2(x_BNC)), c3, c4)

    def _coefficients(self, lrc_4: Tensor | None) -> tuple[Coefficient, ...]:
        if lrc_4 is not None:
            return lrc_4.unbind()
        scale1 = self.scale if self.scale1 is None else self.scale1
        scale2 = self.scale if self.scale2 is None else self.scale2
        return self.keep1, scale1, self.keep2, scale2

    @torch.no_grad()
    def fuse(self) -> None:
        """Folds the factors of the branches into their last projections, for inference."""
        keep1, scale1, keep2, scale2 = self._coefficients(self.lrc)
        fold_scale(self.attn.proj, scale1)
        fold_scale(self.mlp.fc2, scale2)
        self.lrc, self.scale1, self.scale2, self.scale = None, None, None, 1.0
        hold_coefficient(self, "keep1", keep1)
        hold_coefficient(self, "keep2", keep2)


class NLL(nn.Module):
    """The non-linear projection layer: an MLP after a pass, with its residual sum."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        width = spec.embed_dims[stage]
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, spec.hidden(stage, "nll"), spec.drop_rate)
        self.keep1, self.scale = spec.branch_scales(stage)
        self.post_norm = spec.residual == "deepnorm"
        self.lrc = nn.Parameter(torch.ones(2)) if spec.residual == "lrc" else None
        self.scale1 = learned_scale(spec, stage)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Returns c1*x + c2*MLP(LN(x))."""
        c1, c2 = self._coefficients()
        if self.post_norm:
            return self.norm(add_residual(x_BNC, self.mlp(x_BNC), c1, c2))
        return add_residual(x_BNC, self.mlp(self.norm(x_BNC)), c1, c2)

    def _coefficients(self) -> tuple[Coefficient, ...]:
        if self.lrc is not None:
            return self.lrc.unbind()
        return self.keep1, self.scale if self.scale1 is None else self.scale1

    @torch.no_grad()
    def fuse(self) -> None:
        """Folds the factor of the branch into its last projection, for inference."""
        keep1, scale1 = self._coefficients()
        fold_scale(self.mlp.fc2, scale1)
        self.lrc, self.scale1, self.scale = None, None, 1.0
        hold_coefficient(self, "keep1", keep1)


def add_residual(x: Tensor, branch: Tensor, keep: Coefficient, scale: Coefficient) -> Tensor:
    """Returns keep * x + scale * branch, in one kernel if one of the two is 1."""
    if isinstance(scale, Tensor):
        if isinstance(keep, float) and keep == 1.0:
            return torch.addcmul(x, scale, branch)
        return (keep * x).addcmul_(scale, branch)
    if isinstance(keep, Tensor):
        return torch.addcmul(scale * branch if scale != 1.0 else branch, keep, x)
    return torch.add(keep * x if keep != 1.0 else x, branch, alpha=scale)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """F.dropout, not called if the rate is 0 or in evaluation."""
    return F.dropout(x, rate) if rate and training else x


def learned_scale(spec: ModelSpec, stage: int) -> nn.Parameter | None:
    """The learned factor of a branch in `layerscale` and `rezero`; None for the other rules."""
    if spec.residual == "rezero":
        return nn.Parameter(torch.zeros(1))
    if spec.residual == "layerscale":  # CaiT, section 3.1 of arXiv 2103.17239
        start = 0.1 if spec.layers <= 18 else 1e-5 if spec.layers <= 24 else 1e-6
        return nn.Parameter(torch.full((spec.embed_dims[stage],), start))
    return None


def fold_scale(linear: nn.Linear, scale: Coefficient) -> None:
    """Scales the output of a linear layer through its weights; `scale` has 1 or `out` values."""
    linear.weight.mul_(scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale)
    linear.bias.mul_(scale)


def hold_coefficient(module: nn.Module, name: str, value: Coefficient) -> None:
    """Keeps a tensor as a buffer outside the state dict; a number is an attribute already."""
    if isinstance(value, Tensor):
        delattr(module, name)
        module.register_buffer(name, value.detach().clone(), persistent=False)
