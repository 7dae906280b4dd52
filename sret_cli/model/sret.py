"""The Sliced Recursive Transformer, at any depth: stem, passes over shared blocks, head.

"Sliced Recursive Transformer", Shen, Liu and Xing, ECCV 2022, arXiv 2111.05297. Each block is held
once, and a stage walks its schedule (`ModelSpec.schedule`). The state dict has one entry for each
tensor at any depth.

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
        """Maps images to the first stage's map of tokens."""
        x_BCYX = x_BCYX.contiguous(memory_format=torch.channels_last)  # the memory layout of tokens
        x_BCYX = F.relu(self.bn1(self.conv1(x_BCYX)), inplace=True)
        x_BCYX = F.relu(self.bn2(self.conv2(x_BCYX)), inplace=True)
        return F.relu(self.bn3(self.conv3(x_BCYX)), inplace=True)


class Pool(nn.Module):
    """A depthwise 3x3 convolution, as in PiT: a quarter of the tokens, with more channels."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        width, next_width = spec.embed_dims[stage : stage + 2]
        self.side = spec.sides[stage]
        self.conv = nn.Conv2d(width, next_width, 3, 2, 1, groups=width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Maps tokens of one stage to tokens of the next."""
        return to_tokens(self.conv(to_map(x_BNC, self.side)))


class SReT(nn.Module):
    """A Sliced Recursive Transformer, built from a `ModelSpec`.

    Input is `[B, in_chans, img_size, img_size]`, output `[B, num_classes]` logits.
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
        self.call_stem = Stem.forward  # `compile_model` puts a compiled one here
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.embed_dims[0], side, side))
        self.stages = nn.ModuleList(Stage(spec, index) for index in range(spec.stages))
        self.pools = nn.ModuleList(Pool(spec, index) for index in range(spec.stages - 1))
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=LAYER_NORM_EPS)
        self.reset_classifier(spec.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Initialises what does not start at PyTorch's defaults or at a constant."""
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
        """The last stage's tokens, and a list with the output maps `[B, C, Y, X]` of stages.

        As in timm: `indices` is a list of stages, an int for the last n stages, or None for all;
        `stop_early` skips the stages after the last one wanted; `intermediates_only` returns the
        list alone. `norm` has no effect, since SReT normalises after the average over tokens.

        Raises:
            AssertionError: a stage does not exist.
            ValueError: `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt = {output_fmt!r}: SReT supports only 'NCHW'")
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
        """Removes the stages after the last one wanted, as timm's feature extraction does.

        Raises:
            AssertionError: a stage does not exist.
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
        """Averages the tokens, normalises and classifies; `pre_logits` skips the classifier."""
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
        """Names of parameters without weight decay, in addition to those of one dimension."""
        return {"pos_embed", *(n for n, _ in self.named_parameters() if n.endswith("lrc_P4"))}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """A function from a parameter's name to its place from input to output, for layer decay.

        The stem is first, then each block with its NLLs, whichever passes they follow, then the
        head; `coarse` has one place for a stage. A pool has the place of the first block of the
        next stage. Coefficients per pass have that of their stage's first block: they are one
        tensor for all blocks of the stage.
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
        """Store only the input of each segment of passes, and recompute it in the backward pass.

        Loss and gradients stay bitwise the same: a recomputation repeats the random draws.

        Args:
            segments: for each stage, the number of passes in a segment; 0 recomputes none.
            recomputed: for each stage, how many of its first passes are recomputed; None: all.
        """
        for index, stage in enumerate(self.every_stage()):
            stage.segment = segments[index]
            stage.recomputed = None if recomputed is None else recomputed[index]

    def set_recursions(self, recursions: int | tuple[int, ...] | None) -> None:
        """Sets how often later calls run each block; None is the number of the spec.

        Raises:
            SretError: NLLs or coefficients are per pass, and too few for these recursions;
                or the spec has an explicit `order`.
        """
        spec = self.spec
        if recursions is not None:
            if spec.order is not None:
                raise SretError("this model's passes have an explicit order, and no recursions")
            spec = spec.with_values(recursions=recursions)
        for index, stage in enumerate(self.every_stage()):
            stage.set_schedule(spec.schedule(index), spec.drop_path_rates(index))

    def set_reference_shuffle(self, enable: bool = True) -> None:
        """Draw a permutation for each shuffled pass from the CPU's generator, also in evaluation.

        The reference does this. Use it only to reproduce the reference's numbers: two evaluations
        differ unless `torch.manual_seed` is called before each.
        """
        for stage in self.every_stage():
            stage.reference_shuffle = enable

    def fused(self) -> "SReT":
        """A faster copy for inference, without coefficients of branches and without BatchNorm.

        Learned coefficients of blocks and NLLs are folded into the projections before them,
        BatchNorm into the convolutions. Logits differ by rounding. The copy cannot be trained.
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
    """A freshly initialised SReT on torch's default device, in training mode.

    Examples:
        >>> import torch
        >>> from sret_cli import PRESETS, build_model
        >>> model = build_model(PRESETS["nano"])
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in model.parameters())
        331842
    """
    return SReT(spec)


def parameter_count(module: nn.Module) -> int:
    """The number of parameters of a module; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


register_models(build_model)


def to_map(x_BNC: Tensor, side: int) -> Tensor:
    """Tokens of a square, `[B, N, C]`, as a view with the shape `[B, C, Y, X]`."""
    return x_BNC.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(x_BCYX: Tensor) -> Tensor:
    """A map `[B, C, Y, X]` as contiguous tokens `[B, N, C]`."""
    return x_BCYX.flatten(2).transpose(1, 2).contiguous()
