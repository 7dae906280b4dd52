"""The Sliced Recursive Transformer, at any depth: stem, passes over shared blocks, head.

"Sliced Recursive Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297. Each block is held
once, and a stage walks its schedule (`ModelSpec.schedule`); the state dict has one entry for each
tensor, whatever the depth.

Tensors carry their shape in their name: B batch, N tokens, C channels, G slices, n tokens of a
slice, H heads, D head width, P passes or permutations, R gathers, Y and X rows and columns.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sret_cli.blocks import LAYER_NORM_EPS, NLL, Attention, Block, Mlp
from sret_cli.errors import SretError
from sret_cli.processes import share
from sret_cli.recompute import recompute
from sret_cli.registry import register_models
from sret_cli.spec import ModelSpec, Pass, ends_shuffled

SHUFFLE_SEED = 0  # of the permutations that evaluation uses


# What is a pass's own: the order to take tokens in, what multiplies its branches, its coefficients.
Own = tuple[Tensor | None, Tensor | None, Tensor | None]


class Stage(nn.Module):
    """A bank of blocks and NLLs, and the schedule of passes over them."""

    permutations_PN: Tensor
    gathers_RN: Tensor

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        self.full_schedule = spec.schedule(stage)
        self.per_pass = spec.nll == "per_pass" or spec.lrc == "per_pass"
        self.random_shuffle = spec.shuffle == "random"
        self.shuffle_seed = SHUFFLE_SEED + stage
        self.reference_shuffle = False
        self.one_pass = one_pass  # or its compiled form
        self.draws = spec.drop_rate > 0 or spec.attn_drop_rate > 0
        # Of several processes, each draws for all images, with one generator, and takes its share.
        self.rank, self.world_size = 0, 1
        self.generator: torch.Generator | None = None  # torch's own
        self.segment = 0  # recompute in segments of so many passes; 0: not at all
        self.recomputed: int | None = None  # only the first so many passes; None: all
        self.blocks = nn.ModuleList(Block(spec, stage) for _ in range(spec.blocks[stage]))
        self.nlls = nn.ModuleList(NLL(spec, stage) for _ in range(spec.nlls(stage)))
        own = spec.residual == "lrc" and spec.lrc == "per_pass"
        self.lrc_P4 = nn.Parameter(torch.ones(len(self.full_schedule), 4)) if own else None
        # What belongs to one pass alone is found by the pass's block and visit.
        self.lrc_row = {(p.block, p.visit): row for row, p in enumerate(self.full_schedule)}
        self.shuffle_row: dict[tuple[int, int], int] = {}
        empty = torch.empty(0, spec.tokens[stage], dtype=torch.long)
        self.register_buffer("permutations_PN", empty, persistent=False)
        self.register_buffer("gathers_RN", empty, persistent=False)
        self.set_schedule(self.full_schedule, spec.drop_path_rates(stage))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Walks the schedule; all that is random about it is drawn before the first pass.

        Segments of it, where there are some, are recomputed in the backward pass.
        """
        gathers = iter(self._gathers().unbind())
        drops = self._drop_path(x_BNC)
        lrcs = None if self.lrc_P4 is None else self.lrc_P4.unbind()
        own = [
            (
                next(gathers) if p.gathers else None,
                None if drops is None else drops[index],
                None if lrcs is None else lrcs[self.lrc_row[p.block, p.visit]],
            )
            for index, p in enumerate(self.schedule)
        ]
        passes = range(len(own))
        first = 0  # pass that is not recomputed
        if self.segment and torch.is_grad_enabled():
            first = len(passes) if self.recomputed is None else min(self.recomputed, len(passes))
        for start in range(0, first, self.segment or 1):
            segment = passes[start : min(start + self.segment, first)]
            draws = self.draws and self.training
            x_BNC = recompute(self.run_passes, x_BNC, segment, own, draws=draws)
        x_BNC = self.run_passes(x_BNC, passes[first:], own)
        return x_BNC.index_select(1, next(gathers)) if self.ends_shuffled else x_BNC

    def run_passes(self, x_BNC: Tensor, indices: range, own: list[Own]) -> Tensor:
        """The passes of those indices in the schedule, each with what is its own."""
        for index in indices:
            x_BNC = self.run_pass(x_BNC, index, *own[index])
        return x_BNC

    def run_pass(
        self,
        x_BNC: Tensor,
        index: int,
        order_N: Tensor | None = None,
        drop_2B11: Tensor | None = None,
        lrc_4: Tensor | None = None,
    ) -> Tensor:
        """The pass of that index in the schedule, and its NLL."""
        p = self.schedule[index]
        nll = None if p.nll is None else self.nlls[p.nll]
        return self.one_pass(self.blocks[p.block], nll, p.slices, x_BNC, order_N, drop_2B11, lrc_4)

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
        self.ends_shuffled = ends_shuffled(schedule)
        shuffled = [p for p in schedule if p.shuffled]
        rows_P = [self.shuffle_row[p.block, p.visit] for p in shuffled]
        self.gathers_RN = self._compose(self.permutations_PN[rows_P])

    def _gathers(self) -> Tensor:
        """`[R, N]`: how each gather of the schedule, and that at its end, takes tokens."""
        passes, tokens = sum(p.shuffled for p in self.schedule), self.gathers_RN.shape[1]
        if self.reference_shuffle:  # the reference draws on the CPU, in training and in eval
            drawn = [torch.randperm(tokens) for _ in range(passes)]
            if drawn:
                return self._compose(torch.stack(drawn).to(self.gathers_RN.device))
        if self.random_shuffle and self.training and passes:
            noise_PN = torch.rand(
                passes, tokens, device=self.gathers_RN.device, generator=self.generator
            )
            return self._compose(noise_PN.argsort(1))
        return self.gathers_RN

    def _compose(self, orders_PN: Tensor) -> Tensor:
        """The gathers from one order of tokens to the next, given that of each shuffled pass."""
        gathered = [p.shuffled for p in self.schedule if p.gathers] + [False] * self.ends_shuffled
        numbers = iter(range(len(orders_PN)))
        rows_R = [next(numbers) if shuffled else -1 for shuffled in gathered]
        own_N = torch.arange(orders_PN.shape[1], device=orders_PN.device)
        orders_PN = torch.cat((orders_PN, own_N[None]))  # row -1: the tokens' own order
        before_RN = orders_PN[[-1, *rows_R][: len(rows_R)]]
        positions_RN = torch.empty_like(before_RN).scatter_(
            1, before_RN, own_N.expand_as(before_RN)
        )
        return positions_RN.gather(1, orders_PN[rows_R])

    def _drop_path(self, x_BNC: Tensor) -> tuple[Tensor, ...] | None:
        """What multiplies each pass's branches, `[2, B, 1, 1]`; None where nothing is dropped.

        "Deep Networks with Stochastic Depth", Huang et al., 2016.
        """
        if not self.training or not any(self.drop_path_rates):
            return None
        keep_P111 = 1 - torch.tensor(self.drop_path_rates, device=x_BNC.device).view(-1, 1, 1, 1)
        images = len(x_BNC) * self.world_size
        noise_P2B1 = torch.rand(
            len(keep_P111), 2, images, 1, device=x_BNC.device, generator=self.generator
        )
        if self.world_size > 1:
            noise_P2B1 = noise_P2B1[:, :, share(images, self.rank, self.world_size)]
        return ((noise_P2B1 < keep_P111) / keep_P111).unsqueeze(-1).unbind()


def one_pass(
    block: nn.Module,
    nll: nn.Module | None,
    slices: int,
    x_BNC: Tensor,
    order_N: Tensor | None = None,
    drop_2B11: Tensor | None = None,
    lrc_4: Tensor | None = None,
) -> Tensor:
    """One layer: takes the tokens in an order, if one is given, through a block and its NLL."""
    if order_N is not None:
        x_BNC = x_BNC.index_select(1, order_N)
    x_BNC = block(x_BNC, slices, drop_2B11, lrc_4)
    return x_BNC if nll is None else nll(x_BNC)


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
        x_BCYX = x_BCYX.contiguous(memory_format=torch.channels_last)  # tokens lie so, too
        x_BCYX = F.relu(self.bn1(self.conv1(x_BCYX)), inplace=True)
        x_BCYX = F.relu(self.bn2(self.conv2(x_BCYX)), inplace=True)
        return F.relu(self.bn3(self.conv3(x_BCYX)), inplace=True)


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
        self.call_stem = Stem.forward  # or its compiled form
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
        for index, stage in enumerate(self.every_stage()[: last + 1]):
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
        x_BCYX = self.call_stem(self.stem, x_BCYX) + self.pos_embed
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

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Where a parameter stands from input to output, by its name, for layer decay by timm.

        The stem is first, then each block with its NLLs, whichever passes they serve, then the
        head; `coarse` has one place for a stage. A pool goes with the stage that it leads to.
        """

        def place(name: str) -> tuple[float, ...]:
            part, *path = name.split(".")
            if part in ("stem", "pos_embed"):
                return (-1.0,)
            if part not in ("stages", "pools"):
                return (math.inf,)
            stage = int(path[0]) + (part == "pools")
            if coarse or part == "pools" or path[1] not in ("blocks", "nlls"):
                return (stage, 0)
            block = int(path[2])
            if path[1] == "nlls":
                schedule = self.spec.schedule(stage)
                block = next(p.block for p in schedule if p.nll == block)
            return (stage, block)

        return place

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
        for index, stage in enumerate(self.every_stage()):
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
        for index, stage in enumerate(self.every_stage()):
            stage.set_schedule(spec.schedule(index), spec.drop_path_rates(index))

    def set_reference_shuffle(self, enable: bool = True) -> None:
        """Draw a permutation for each shuffled pass from the CPU's generator, in eval as well.

        So does the reference. Two evaluations then differ, unless `torch.manual_seed` comes before
        each; use it to check against the reference's numbers, and for nothing else.
        """
        for stage in self.every_stage():
            stage.reference_shuffle = enable

    def fused(self) -> "SReT":
        """A copy for inference that does less: no coefficients of branches, no BatchNorm.

        Learned scalars are folded into the projections before them (where they belong to a block),
        BatchNorm into the convolutions. Logits differ by rounding; it is not to be trained.
        """
        model = deepcopy(self).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Block | NLL):
                module.fuse()
        for n in "123":
            conv, norm = getattr(model.stem, f"conv{n}"), getattr(model.stem, f"bn{n}")
            setattr(model.stem, f"conv{n}", fuse_conv_bn_eval(conv, norm))
            setattr(model.stem, f"bn{n}", nn.Identity())
        return model

    def every_stage(self) -> list[Stage]:
        """The stages, from the first to the last."""
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
