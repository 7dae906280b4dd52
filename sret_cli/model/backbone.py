"""Adds recursion, tied weights and NLLs to timm's vision transformers.

A timm model keeps its blocks in a sequence and walks it: `for block in blocks: x = block(x, ...)`.
`Passes` replaces that sequence, and iterating over it gives a schedule of passes. The model's own
`forward_features` does the rest: embeddings, class tokens, pooling between stages, and further
arguments of the blocks (masks, rotary embeddings, the height and width of the map).

Each block of the timm model keeps what is not a weight: its drop-path rate, the shift and mask of
its window (Swin), its BatchNorm statistics (XCiT). Tied blocks have one set of weights. The state
dict has it once, under the name of the first of them. All other names are timm's.

Tensors carry their shape in their name: B batch, X any dimensions, C channels. timm's blocks take
tokens, `[B, N, C]`, or maps with channels last, `[B, H, W, C]`.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from math import gcd, isqrt, prod
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sret_cli.model.blocks import NLL
from sret_cli.model.layer_places import place_parameters
from sret_cli.runtime.errors import SretError, first_line, show_note_once
from sret_cli.spec.backbone import MISFITS, BackboneSpec
from sret_cli.spec.depth import MAX_LAYERS, divisors
from sret_cli.spec.model import ModelSpec

FEW_TOKENS = 4  # with fewer, the user gets a note


class Passes(nn.Module):
    """A sequence of blocks, tied in groups of `share`; iterating over it gives the passes.

    With `grad_checkpointing` the backward pass recomputes every pass instead of storing it.
    """

    def __init__(self, blocks: list[nn.Module], spec: BackboneSpec, width: int) -> None:
        super().__init__()
        self.count = len(blocks)
        self.recursions = spec.recursions
        self.loop = spec.loop
        self.share = len(blocks) if spec.share == "all" else spec.share
        self.nll = spec.nll
        self.grad_checkpointing = False
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)
        self._tie()
        nlls = {"per_pass": self.layers, "per_block": self.banks, "none": 0}[spec.nll]
        if nlls:
            self.nlls = nn.ModuleList(build_nll(width, spec.nll_ratio) for _ in range(nlls))

    @property
    def layers(self) -> int:
        """Number of passes."""
        return self.count * self.recursions

    @property
    def banks(self) -> int:
        """Number of sets of block weights."""
        return self.count // self.share

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(range(self.count)[index]))

    def __iter__(self) -> Iterator[Any]:
        """The functions that timm's loop calls in turn: all passes of a block, or one pass each."""
        if self.loop == "internal":  # one call for each block: some have arguments of their own
            for start in range(0, self.layers, self.recursions):
                yield partial(self.run, range(start, start + self.recursions))
        else:
            for number in range(self.layers):
                yield partial(self.run, (number,))

    def forward(self, x_BXC: Tensor) -> Tensor:
        """Walks the schedule."""
        for call in self:
            x_BXC = call(x_BXC)
        return x_BXC

    def run(self, numbers: Any, x_BXC: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Runs the passes with these numbers in the schedule, each with its NLL."""
        for number in numbers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x_BXC = checkpoint(
                    self.run_pass, number, x_BXC, *arguments, use_reentrant=False, **named
                )
            else:
                x_BXC = self.run_pass(number, x_BXC, *arguments, **named)
        return x_BXC

    def run_pass(self, number: int, x_BXC: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Runs the pass with this number in the schedule, and its NLL."""
        index = self._block_of_pass(number)
        x_BXC = self[index](x_BXC, *arguments, **named)
        if self.nll == "none":
            return x_BXC
        return self.nlls[number if self.nll == "per_pass" else index // self.share](x_BXC)

    def blocks_of_nlls(self) -> list[int]:
        """For each NLL, the block that it follows; of tied blocks the first."""
        if self.nll == "none":
            return []
        if self.nll == "per_block":
            return list(range(0, self.count, self.share))
        blocks = [self._block_of_pass(number) for number in range(self.layers)]
        return [block - block % self.share for block in blocks]

    def _block_of_pass(self, number: int) -> int:
        return number // self.recursions if self.loop == "internal" else number % self.count

    def _tie(self) -> None:
        """Gives tied blocks the parameters of the first block of their group.

        They are plain attributes there, so that torch registers, moves and saves them once.
        """
        for index in range(self.count):
            first = self[index - index % self.share]
            if first is self[index]:
                continue
            pairs = zip(self[index].modules(), first.modules(), strict=True)
            for module, source in pairs:
                for name, parameter in source._parameters.items():
                    if parameter is not None:
                        module._parameters.pop(name, None)
                        module.__dict__[name] = parameter

    def _apply(self, fn: Any, recurse: bool = True) -> "Passes":
        super()._apply(fn, recurse)
        self._tie()  # a conversion may have replaced the parameters of the first block
        return self


def build_backbone(spec: BackboneSpec) -> Any:
    """A timm model with recursion, freshly initialised, in training mode; it keeps its `spec`.

    A model without recursion, tied weights and NLLs gets `Passes` too, if its blocks allow that, so
    that passes can be recomputed. Its state dict and its logits stay the same.

    Raises:
        SretError: timm cannot build the model with these values, or it cannot be made recursive.
    """
    model = _create(spec)
    try:
        widths = _check(model, spec)
    except SretError as error:
        if not spec.untouched:
            raise SretError(f"{spec.backbone} cannot be made recursive: {error}") from None
        widths = {}
    _install(model, spec, widths)
    model.spec = spec
    model.set_grad_checkpointing = MethodType(recompute_passes, model)
    if widths:
        model.group_matcher = MethodType(group_matcher, model)
    return model


def group_matcher(model: nn.Module, coarse: bool = False) -> Callable[[str], int]:
    """A function from a parameter's name to its place from input to output, for layer decay."""
    block_of_nll = {
        f"{name}.nlls.{number}": f"{name}.{block}"
        for name, passes in block_sequences(model).items()
        for number, block in enumerate(passes.blocks_of_nlls())
    }
    return place_parameters(model, tuple(block_sequences(model)), block_of_nll, coarse)


def recompute_passes(model: nn.Module, enable: bool = True) -> None:
    """Recompute every pass in the backward pass instead of storing it.

    BatchNorm inside blocks (XCiT) then counts each batch twice in its running statistics.

    Raises:
        SretError: the model has no `Passes`.
    """
    found = block_sequences(model)
    if enable and not found:
        raise SretError(
            "its passes cannot be recomputed: no sequence of blocks; use recompute none"
        )
    for passes in found.values():
        passes.grad_checkpointing = enable


def block_sequences(model: nn.Module) -> dict[str, Passes]:
    """The sequences of blocks of a timm model, one for each stage, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Passes)}


def build_nll(width: int, nll_ratio: float) -> NLL:
    """An NLL for tokens of that width."""
    names = ("num_heads", "blocks", "recursions", "slices", "recursive_slices")
    one: dict[str, Any] = dict.fromkeys(names, 1)
    return NLL(ModelSpec(embed_dims=(width,), nll_ratio=nll_ratio, **one), 0)


def _create(spec: BackboneSpec) -> Any:
    import timm

    values: dict[str, Any] = {"in_chans": spec.in_chans, "num_classes": spec.num_classes}
    if spec.drop_path_rate:
        values["drop_path_rate"] = spec.drop_path_rate
    values |= dict(spec.timm_args)
    try:
        try:
            model = timm.create_model(spec.backbone, img_size=spec.img_size, **values)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            model = timm.create_model(spec.backbone, **values)  # takes images of any size
        with torch.no_grad():
            probe = deepcopy(model).eval().to("meta")
            probe(_image(spec))
    except MISFITS as error:
        if "allocate memory" in str(error):
            raise
        reason = first_line(error)
        given = "".join(f", {name} = {value!r}" for name, value in spec.timm_args)
        raise SretError(
            f"timm cannot build {spec.backbone} with img_size = {spec.img_size}, in_chans = "
            f"{spec.in_chans}, drop_path_rate = {spec.drop_path_rate:g}{given}: {reason}"
        ) from None
    return model


def _image(spec: BackboneSpec) -> Tensor:
    return torch.zeros(1, spec.in_chans, spec.img_size, spec.img_size, device="meta")


def _find(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost sequences of blocks of a timm model, without those of its stem."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in (*found, "patch_embed"))
        if name.rpartition(".")[2] == "blocks" and not inside:
            kinds = nn.ModuleList | nn.Sequential
            if isinstance(module, kinds) and not any(isinstance(b, kinds) for b in module):
                found[name] = list(module)
    return {name: blocks for name, blocks in found.items() if blocks}


def _install(model: nn.Module, spec: BackboneSpec, widths: dict[str, int]) -> None:
    for name, width in widths.items():
        blocks = list(model.get_submodule(name).children())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Passes(blocks, spec, width))


def _check(model: nn.Module, spec: BackboneSpec) -> dict[str, int]:
    """The width of each sequence of blocks, from a run of a copy on "meta" with two recursions.

    Raises:
        SretError: the model cannot be made recursive; the message says why.
    """
    found = _find(model)
    if not found:
        raise SretError("it has no sequence of transformer blocks, as a ViT has")
    _check_tying(found, spec)
    layers = sum(map(len, found.values())) * spec.recursions
    if layers > MAX_LAYERS:
        raise SretError(f"{layers:,} layers are more than the {MAX_LAYERS:,} that sret builds")
    probe = deepcopy(model).eval().to("meta")
    _install(probe, spec.with_values(recursions=2, share=1, nll="none"), dict.fromkeys(found, 0))
    widths: dict[str, int] = {}
    grids: dict[str, int] = {}
    calls = {(name, index): 0 for name in found for index in range(len(found[name]))}

    def watch(
        name: str, index: int, block: nn.Module, arguments: tuple[Any, ...], output: Any
    ) -> None:
        x = arguments[0] if arguments else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise SretError(f"the blocks of {name} take or return more than one tensor")
        if x.shape != output.shape:
            change = f"{list(x.shape[1:])} to {list(output.shape[1:])}"
            raise SretError(f"block {index} of {name} changes the shape of its input, {change}")
        if x.ndim != 3 and getattr(model, "output_fmt", None) != "NHWC":
            raise SretError(
                f"the blocks of {name} are not transformer blocks: they take maps, not tokens"
            )
        widths[name] = x.shape[-1]
        grids[name] = _grid_tokens(model, x)
        calls[name, index] += 1

    for name, passes in block_sequences(probe).items():
        for index in range(len(passes)):
            passes[index].register_forward_hook(partial(watch, name, index))
    try:
        with torch.no_grad():
            probe(_image(spec))
    except MISFITS as error:
        reason = first_line(error)
        raise SretError(f"a second pass fails ({spec.loop} loop): {reason}") from None
    for (name, index), times in calls.items():
        if times != 2:
            raise SretError(
                f"it does not run its {name} in order: block {index} ran {times} times in two "
                "recursions"
            )
    _note_few_tokens(spec, grids)
    return widths


def _grid_tokens(model: nn.Module, x: Tensor) -> int:
    """The number of image tokens in a block's input, without class tokens and registers."""
    tokens = prod(x.shape[1:-1])
    without = tokens - getattr(model, "num_prefix_tokens", 0)
    # Some models add their class token after these blocks. Images and their grids are square.
    return without if without > 0 and (isqrt(without) ** 2 == without or x.ndim > 3) else tokens


def _note_few_tokens(spec: BackboneSpec, grids: dict[str, int]) -> None:
    name = min(grids, key=lambda name: grids[name])
    if grids[name] < FEW_TOKENS:
        tokens = "1 token" if grids[name] == 1 else f"{grids[name]} tokens"
        where = "its blocks" if len(grids) == 1 else name
        show_note_once(
            f"{spec.backbone} at {spec.img_size} px has {tokens} of the image in {where}, too few "
            "for attention to do much; use larger images or, if the model has it, a smaller "
            "model.timm_args.patch_size"
        )


def _check_tying(found: dict[str, list[nn.Module]], spec: BackboneSpec) -> None:
    common = gcd(*map(len, found.values()))
    if spec.share != "all" and common % spec.share:
        counts = " + ".join(str(len(blocks)) for blocks in found.values())
        raise SretError(
            f"share = {spec.share} does not divide its {counts} blocks; use "
            f"{', '.join(map(str, divisors(common)))} or all"
        )
    for name, blocks in found.items():
        share = len(blocks) if spec.share == "all" else spec.share
        for index, block in enumerate(blocks):
            first = index - index % share
            shapes = [
                {n: tuple(p.shape) for n, p in b.named_parameters()} for b in (blocks[first], block)
            ]
            if shapes[0] != shapes[1]:
                wrong = sorted(
                    n for n in shapes[0] | shapes[1] if len({s.get(n) for s in shapes}) > 1
                )
                raise SretError(
                    f"blocks {first} and {index} of {name} cannot share weights: {wrong[0]} is "
                    f"{shapes[0].get(wrong[0])} and {shapes[1].get(wrong[0])}; use a smaller share"
                )
