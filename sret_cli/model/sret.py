"""The Sliced Recursive Transformer, at any depth: stem, passes over shared blocks, head.

"Sliced Recursive Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297. Each block is held
once, and a stage walks its schedule (`ModelSpec.schedule`); the state dict has one entry for each
tensor, whatever the depth.

Tensors carry their shape in their name: B batch, N tokens, C channels, Y and X rows and columns.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sret_cli.model.blocks import LAYER_NORM_EPS, NLL, Attention, Block, Mlp
from sret_cli.model.registry import register_models
from sret_cli.model.stage import Stage
from sret_cli.runtime.errors import SretError
from sret_cli.spec.model import ModelSpec


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

        Raises:
            AssertionError: there is no such stage, or not so many.
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
        """Drops what the stages asked for do not need, as timm's feature extraction does.

        Raises:
            AssertionError: there is no such stage, or not so many.
        """
        wanted = self._stage_indices(indices)
        self.stages = self.stages[: max(wanted) + 1]
        self.pools = self.pools[: max(wanted)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def _stage_indices(self, indices: int | list[int] | None) -> list[int]:
        from timm.models._features import feature_take_indices  # timm takes seconds to import

        return list(feature_take_indices(len(self.stages), indices)[0])

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
        head; `coarse` has one place for a stage. A pool goes with the first block of the stage that
        it leads to, and so do coefficients per pass: they are one tensor for all its blocks.
        """
        block_of = [
            {p.nll: p.block for p in self.spec.schedule(stage)} for stage in range(self.spec.stages)
        ]

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
            return (stage, block_of[stage][block] if path[1] == "nlls" else block)

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


def parameter_count(module: nn.Module) -> int:
    """The number of parameters of a module; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


register_models(build_model)


def to_map(x_BNC: Tensor, side: int) -> Tensor:
    """Tokens of a square, `[B, N, C]`, as a map `[B, C, Y, X]` that shares their memory."""
    return x_BNC.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(x_BCYX: Tensor) -> Tensor:
    """A map `[B, C, Y, X]` as contiguous tokens `[B, N, C]`."""
    return x_BCYX.flatten(2).transpose(1, 2).contiguous()
