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

from sret_cli.blocks import LAYER_NORM_EPS, NLL, Attention, Block, Mlp
from sret_cli.errors import SretError
from sret_cli.recompute import recompute
from sret_cli.registry import register_models
from sret_cli.spec import ModelSpec, Pass

SHUFFLE_SEED = 0  # of the permutations that evaluation uses


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
        self.drops = spec.drop_rate > 0 or spec.attn_drop_rate > 0
        self.segment = 0  # recompute in segments of so many passes; 0: not at all
        self.recomputed: int | None = None  # only the first so many passes; None: all
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
        """Walks the schedule, or the segments of it that are recomputed in the backward pass."""
        lrcs = None if self.lrc_P4 is None else self.lrc_P4.unbind()
        passes = range(len(self.schedule))
        first = 0  # pass that is not recomputed
        if self.segment and torch.is_grad_enabled():
            first = len(passes) if self.recomputed is None else min(self.recomputed, len(passes))
        for start in range(0, first, self.segment or 1):
            segment = passes[start : min(start + self.segment, first)]
            x_BNC = recompute(self.run_passes, x_BNC, segment, lrcs, draws=self._draws(segment))
        return self.run_passes(x_BNC, passes[first:], lrcs)

    def run_passes(
        self, x_BNC: Tensor, indices: range, lrcs: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """The passes of those indices in the schedule, one after another."""
        for index in indices:
            p = self.schedule[index]
            lrc_4 = None if lrcs is None else lrcs[self.lrc_row[p.block, p.visit]]
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

    def _draws(self, indices: range) -> bool:
        """Whether any of the passes draws random numbers, which its recomputation is to repeat."""
        shuffles = self.reference_shuffle or (self.random_shuffle and self.training)
        return (
            self.training and (self.drops or any(self.drop_path_rates[i] for i in indices))
        ) or (shuffles and any(self.schedule[i].shuffled for i in indices))

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

    `set_recompute` has passes recomputed in the backward pass instead of stored.
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
        self.set_recompute((int(enable),) * len(self.stages))

    def set_recompute(
        self, segments: tuple[int, ...], recomputed: tuple[int, ...] | None = None
    ) -> None:
        """Store what enters each segment of passes alone, and recompute it in the backward pass.

        Loss and gradients stay bitwise what they are without it: a recomputation repeats the random
        draws of the first time.

        Args:
            segments: for each stage, the passes of a segment; 0 recomputes none.
            recomputed: for each stage, how many of its first passes are recomputed; all if None.
        """
        for index, stage in enumerate(self._stages()):
            stage.segment = segments[index]
            stage.recomputed = None if recomputed is None else recomputed[index]

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


def fixed_permutations(count: int, tokens: int, seed: int) -> Tensor:
    """`[count, tokens]`: permutations that depend on the seed and their number alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator, device="cpu") for _ in range(count)]
    return torch.stack(rows) if rows else torch.empty(0, tokens, dtype=torch.long)
