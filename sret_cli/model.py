"""The Sliced Recursive Transformer, at any depth: stem, passes over shared blocks, head.

"Sliced Recursive Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297. Each block is held
once, and a stage walks its schedule (`ModelSpec.schedule`); the state dict has one entry for each
tensor, whatever the depth.

Tensors carry their shape in their name: B batch, N tokens, C channels, G slices, n tokens of a
slice, H heads, D head width, P permutations, Y and X rows and columns.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sret_cli.errors import SretError
from sret_cli.registry import register_models
from sret_cli.spec import ModelSpec, Pass

LAYER_NORM_EPS = 1e-6
SHUFFLE_SEED = 0  # of the permutations that evaluation uses


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


class Stage(nn.Module):
    """A bank of blocks and NLLs, and the schedule of passes over them."""

    permutations_PN: Tensor

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        self.schedule = self.full_schedule = spec.schedule(stage)
        self.drop_path_rates = spec.drop_path_rates(stage)
        self.per_pass = spec.nll == "per_pass" or spec.lrc == "per_pass"
        self.random_shuffle = spec.shuffle == "random"
        self.shuffle_seed = SHUFFLE_SEED + stage
        self.reference_shuffle = False
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(Block(spec, stage) for _ in range(spec.blocks[stage]))
        self.nlls = nn.ModuleList(NLL(spec, stage) for _ in range(spec.nlls(stage)))
        own = spec.residual == "lrc" and spec.lrc == "per_pass"
        self.lrc_P4 = nn.Parameter(torch.ones(len(self.schedule), 4)) if own else None
        # What belongs to one pass alone is found by the pass's block and visit.
        self.lrc_row = {(p.block, p.visit): row for row, p in enumerate(self.schedule)}
        shuffled = [p for p in self.schedule if p.shuffled]
        self.shuffle_row = {(p.block, p.visit): row for row, p in enumerate(shuffled)}
        permutations = fixed_permutations(len(shuffled), spec.tokens[stage], self.shuffle_seed)
        self.register_buffer("permutations_PN", permutations, persistent=False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Walks the schedule."""
        lrcs = None if self.lrc_P4 is None else self.lrc_P4.unbind()
        for index, p in enumerate(self.schedule):
            lrc_4 = None if lrcs is None else lrcs[self.lrc_row[p.block, p.visit]]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x_BNC = checkpoint(self.run_pass, x_BNC, index, lrc_4, use_reentrant=False)
            else:
                x_BNC = self.run_pass(x_BNC, index, lrc_4)
        return x_BNC

    def run_pass(self, x_BNC: Tensor, index: int, lrc_4: Tensor | None = None) -> Tensor:
        """The pass of that index in the schedule, and its NLL."""
        p = self.schedule[index]
        order_N = self._order(p, x_BNC) if p.shuffled else None
        rate = self.drop_path_rates[index]
        x_BNC = self.blocks[p.block](x_BNC, p.slices, order_N, rate, lrc_4)
        return x_BNC if p.nll is None else self.nlls[p.nll](x_BNC)

    def set_schedule(self, schedule: tuple[Pass, ...], drop_path_rates: tuple[float, ...]) -> None:
        """Walks another schedule from now on, over the same blocks.

        A pass takes the NLL and the coefficients of the same visit to the same block.

        Raises:
            SretError: a visit has no weights of its own, and needs them.
        """
        if self.per_pass:
            own = {(p.block, p.visit): p for p in self.full_schedule}
            if any((p.block, p.visit) not in own for p in schedule):
                raise SretError(
                    f"{max(p.visit for p in schedule) + 1} recursions are more than the "
                    f"{max(p.visit for p in self.full_schedule) + 1} that this model has weights "
                    "for (nll or lrc is per_pass); use fewer"
                )
            schedule = tuple(p._replace(nll=own[p.block, p.visit].nll) for p in schedule)
        for p in schedule:
            if p.shuffled:
                self.shuffle_row.setdefault((p.block, p.visit), len(self.shuffle_row))
        rows, tokens = self.permutations_PN.shape
        if len(self.shuffle_row) > rows:  # the first rows stay what they are
            more = fixed_permutations(len(self.shuffle_row), tokens, self.shuffle_seed)
            self.permutations_PN = more.to(self.permutations_PN.device)
        self.schedule, self.drop_path_rates = schedule, drop_path_rates

    def _order(self, p: Pass, x_BNC: Tensor) -> Tensor:
        if self.reference_shuffle:  # the reference draws on the CPU, in training and in eval
            return torch.randperm(x_BNC.shape[1]).to(x_BNC.device)
        if self.random_shuffle and self.training:
            return torch.randperm(x_BNC.shape[1], device=x_BNC.device)
        return self.permutations_PN[self.shuffle_row[p.block, p.visit]]


class Stem(nn.Module):
    """Three 3x3 convolutions with BatchNorm and ReLU, of widths C/2, C and C."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.embed_dims[0]
        s1, s2, s3 = spec.stem_strides
        self.conv1 = nn.Conv2d(spec.in_chans, width // 2, 3, s1, 1)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, 3, s2, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, s3, 1)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """Images to the first stage's map of tokens."""
        x_BCYX = F.relu(self.bn1(self.conv1(x_BCYX)))
        x_BCYX = F.relu(self.bn2(self.conv2(x_BCYX)))
        return F.relu(self.bn3(self.conv3(x_BCYX)))


class Pool(nn.Module):
    """A depthwise 3x3 convolution of stride 2 that widens: a quarter of the tokens, as in PiT."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        width, next_width = spec.embed_dims[stage : stage + 2]
        self.side = spec.sides[stage]
        self.conv = nn.Conv2d(width, next_width, 3, 2, 1, groups=width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens of one stage to tokens of the next."""
        return to_tokens(self.conv(to_map(x_BNC, self.side)))


class SReT(nn.Module):
    """A Sliced Recursive Transformer; `spec` says everything about it.

    Input is `[B, in_chans, img_size, img_size]`, output `[B, num_classes]` logits.

    Set `grad_checkpointing` to recompute every pass in the backward pass instead of storing it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = spec.num_classes
        self.num_features = self.head_hidden_size = spec.embed_dims[-1]
        stride = prod(spec.stem_strides)
        self.feature_info = [
            {"num_chs": width, "reduction": stride * 2**index, "module": f"stages.{index}"}
            for index, width in enumerate(spec.embed_dims)
        ]
        side = spec.sides[0]
        self.stem = Stem(spec)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.embed_dims[0], side, side))
        self.stages = nn.ModuleList(Stage(spec, index) for index in range(spec.stages))
        self.pools = nn.ModuleList(Pool(spec, index) for index in range(spec.stages - 1))
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=LAYER_NORM_EPS)
        self.reset_classifier(spec.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Sets all that does not keep PyTorch's default (and LayerNorm 1 and 0, LRC 1)."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.spec.residual == "deepnorm":  # section 4 of arXiv 2203.00555
            gain = (4 * self.spec.branches) ** -0.25
            for module in self.stages.modules():
                if isinstance(module, Mlp):
                    nn.init.xavier_normal_(module.fc1.weight, gain)
                    nn.init.xavier_normal_(module.fc2.weight, gain)
                elif isinstance(module, Attention):
                    query, key, value = module.qkv.weight.chunk(3)
                    nn.init.xavier_normal_(query)
                    nn.init.xavier_normal_(key)
                    nn.init.xavier_normal_(value, gain)
                    nn.init.xavier_normal_(module.proj.weight, gain)

    def forward_features(self, x_BCYX: Tensor) -> Tensor:
        """The last stage's tokens, `[B, N, C]`."""
        x_BNC = self._embed(x_BCYX)
        for index, stage in enumerate(self.stages):
            x_BNC = stage(self.pools[index - 1](x_BNC) if index else x_BNC)
        return x_BNC

    def forward_intermediates(
        self,
        x_BCYX: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps `[B, C, Y, X]` that stages end with, and the last stage's tokens before them.

        As in timm: `indices` are stages, an int takes the last so many, None all; `stop_early`
        leaves out stages that are not asked for. There is no norm before the average to apply.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt = {output_fmt!r}: SReT puts out 'NCHW'")
        wanted = self._stage_indices(indices)
        last = max(wanted) if stop_early else len(self.stages) - 1
        maps = []
        x_BNC = self._embed(x_BCYX)
        for index, stage in enumerate(self._stages()[: last + 1]):
            x_BNC = stage(self.pools[index - 1](x_BNC) if index else x_BNC)
            if index in wanted:
                maps.append(to_map(x_BNC, self.spec.sides[index]))
        return maps if intermediates_only else (x_BNC, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the stages asked for do not need, as timm's feature extraction does."""
        wanted = self._stage_indices(indices)
        self.stages = self.stages[: max(wanted) + 1]
        self.pools = self.pools[: max(wanted)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def _stage_indices(self, indices: int | list[int] | None) -> list[int]:
        stages = range(len(self.stages))
        if indices is None:
            return list(stages)
        return list(stages[-indices:] if isinstance(indices, int) else (stages[i] for i in indices))

    def _embed(self, x_BCYX: Tensor) -> Tensor:
        x_BCYX = self.stem(x_BCYX) + self.pos_embed
        return to_tokens(F.dropout(x_BCYX, self.spec.drop_rate, self.training))

    def forward_head(self, x_BNC: Tensor, pre_logits: bool = False) -> Tensor:
        """Averages the tokens, normalises and classifies; `pre_logits` leaves the last step out."""
        x_BC = self.norm(F.adaptive_avg_pool2d(to_map(x_BNC, self.spec.sides[-1]), 1).flatten(1))
        return x_BC if pre_logits else self.head(x_BC)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.forward_head(self.forward_features(x_BCYX))

    def get_classifier(self) -> nn.Module:
        """The linear head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for another number of classes (0: none); pooling is always "avg"."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool = {global_pool!r}: SReT has 'avg' only")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, beside those of one dimension."""
        return {"pos_embed", *(n for n, _ in self.named_parameters() if n.endswith("lrc_P4"))}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every pass in the backward pass instead of storing it."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

    def set_recursions(self, recursions: int | tuple[int, ...] | None) -> None:
        """Runs the same blocks another number of times from now on; None is the spec's own number.

        Raises:
            SretError: NLLs or coefficients per pass have no weights for so many recursions, or the
                passes have an explicit order.
        """
        spec = self.spec
        if recursions is not None:
            if spec.order is not None:
                raise SretError("this model's passes have an explicit order, and no recursions")
            spec = spec.with_values(recursions=recursions)
        for index, stage in enumerate(self._stages()):
            stage.set_schedule(spec.schedule(index), spec.drop_path_rates(index))

    def set_reference_shuffle(self, enable: bool = True) -> None:
        """Draw a permutation for each shuffled pass from the CPU's generator, in eval as well.

        So does the reference. Two evaluations then differ, unless `torch.manual_seed` comes before
        each; use it to check against the reference's numbers, and for nothing else.
        """
        for stage in self._stages():
            stage.reference_shuffle = enable

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]


def build_model(spec: ModelSpec) -> SReT:
    """A freshly initialised model on the default device, in training mode."""
    return SReT(spec)


register_models(build_model)


def to_map(x_BNC: Tensor, side: int) -> Tensor:
    """Tokens of a square, `[B, N, C]`, as a map `[B, C, Y, X]` that shares their memory."""
    return x_BNC.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(x_BCYX: Tensor) -> Tensor:
    """A map `[B, C, Y, X]` as contiguous tokens `[B, N, C]`."""
    return x_BCYX.flatten(2).transpose(1, 2).contiguous()


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


def fixed_permutations(count: int, tokens: int, seed: int) -> Tensor:
    """`[count, tokens]`: permutations that depend on the seed and their number alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator, device="cpu") for _ in range(count)]
    return torch.stack(rows) if rows else torch.empty(0, tokens, dtype=torch.long)


def inverse(order_N: Tensor) -> Tensor:
    """The permutation that undoes another."""
    positions = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, positions)
