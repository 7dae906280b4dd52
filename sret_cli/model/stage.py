"""A stage of the Sliced Recursive Transformer: a schedule of passes over a bank of blocks.

Tensors carry their shape in their name: B batch, N tokens, C channels, P passes or permutations, R
gathers.
"""

import torch
from torch import Tensor, nn

from sret_cli.model.blocks import NLL, Block
from sret_cli.model.recompute import recompute
from sret_cli.runtime.errors import SretError
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.passes import Pass, ends_shuffled

SHUFFLE_SEED = 0  # of the permutations in evaluation


# What belongs to one pass: the order of its tokens, its drop-path factors, its coefficients.
OfPass = tuple[Tensor | None, Tensor | None, Tensor | None]


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
        self.one_pass = one_pass  # `compile_model` puts a compiled one here
        self.draws = spec.drop_rate > 0 or spec.attn_drop_rate > 0
        self.generator: torch.Generator | None = None  # None: torch's default
        # If a call gets only a part of a batch: the size of the batch, and the places of the part.
        self.batch_images = 0
        self.places: Tensor | None = None
        self.segment = 0  # passes of a segment that is recomputed; 0: nothing is recomputed
        self.recomputed: int | None = None  # how many of the first passes; None: all
        self.blocks = nn.ModuleList(Block(spec, stage) for _ in range(spec.blocks[stage]))
        self.nlls = nn.ModuleList(NLL(spec, stage) for _ in range(spec.nlls(stage)))
        own = spec.residual == "lrc" and spec.lrc == "per_pass"
        self.lrc_P4 = nn.Parameter(torch.ones(len(self.full_schedule), 4)) if own else None
        # The weights and permutation of a pass are found by its block and visit.
        self.lrc_row = {(p.block, p.visit): row for row, p in enumerate(self.full_schedule)}
        self.shuffle_row: dict[tuple[int, int], int] = {}
        empty = torch.empty(0, spec.tokens[stage], dtype=torch.long)
        self.register_buffer("permutations_PN", empty, persistent=False)
        self.register_buffer("gathers_RN", empty, persistent=False)
        self.set_schedule(self.full_schedule, spec.drop_path_rates(stage))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Walks the schedule; permutations and drop path are drawn before the first pass.

        The backward pass recomputes the segments that `SReT.set_recompute` has chosen.
        """
        gathers = iter(self._gathers().unbind())
        drops = self._drop_path(x_BNC)
        lrcs = None if self.lrc_P4 is None else self.lrc_P4.unbind()
        of_passes = [
            (
                next(gathers) if p.gathers else None,
                None if drops is None else drops[index],
                None if lrcs is None else lrcs[self.lrc_row[p.block, p.visit]],
            )
            for index, p in enumerate(self.schedule)
        ]
        passes = range(len(of_passes))
        first = 0  # the first pass that is not recomputed
        if self.segment and torch.is_grad_enabled():
            first = len(passes) if self.recomputed is None else min(self.recomputed, len(passes))
        for start in range(0, first, self.segment or 1):
            segment = passes[start : min(start + self.segment, first)]
            draws = self.draws and self.training
            x_BNC = recompute(self.run_passes, x_BNC, segment, of_passes, draws=draws)
        x_BNC = self.run_passes(x_BNC, passes[first:], of_passes)
        return x_BNC.index_select(1, next(gathers)) if self.ends_shuffled else x_BNC

    def run_passes(self, x_BNC: Tensor, indices: range, of_passes: list[OfPass]) -> Tensor:
        """Runs the passes with these indices in the schedule, each with its part of `of_passes`."""
        for index in indices:
            x_BNC = self.run_pass(x_BNC, index, *of_passes[index])
        return x_BNC

    def run_pass(
        self,
        x_BNC: Tensor,
        index: int,
        order_N: Tensor | None = None,
        drop_2B11: Tensor | None = None,
        lrc_4: Tensor | None = None,
    ) -> Tensor:
        """Runs the pass with this index in the schedule, and its NLL."""
        p = self.schedule[index]
        nll = None if p.nll is None else self.nlls[p.nll]
        return self.one_pass(self.blocks[p.block], nll, p.slices, x_BNC, order_N, drop_2B11, lrc_4)

    def set_schedule(self, schedule: tuple[Pass, ...], drop_path_rates: tuple[float, ...]) -> None:
        """Sets the schedule that later calls walk, over the same blocks.

        A pass uses the NLL and the coefficients of the same visit to the same block.

        Raises:
            SretError: NLLs or coefficients are per pass, and a visit has none.
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
        if len(self.shuffle_row) > rows:  # the first rows stay the same
            more = fixed_permutations(len(self.shuffle_row), tokens, self.shuffle_seed)
            self.permutations_PN = more.to(self.permutations_PN.device)
        self.schedule, self.drop_path_rates = schedule, drop_path_rates
        self.ends_shuffled = ends_shuffled(schedule)
        shuffled = [p for p in schedule if p.shuffled]
        rows_P = [self.shuffle_row[p.block, p.visit] for p in shuffled]
        self.gathers_RN = self._compose(self.permutations_PN[rows_P])

    def _gathers(self) -> Tensor:
        """`[R, N]`: the token order of each gather of the schedule, and of the one at its end."""
        passes, tokens = sum(p.shuffled for p in self.schedule), self.gathers_RN.shape[1]
        if self.reference_shuffle:  # the reference draws on the CPU, also in eval
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
        """The gathers from one token order to the next, from the order of each shuffled pass."""
        gathered = [p.shuffled for p in self.schedule if p.gathers] + [False] * self.ends_shuffled
        numbers = iter(range(len(orders_PN)))
        rows_R = [next(numbers) if shuffled else -1 for shuffled in gathered]
        own_N = torch.arange(orders_PN.shape[1], device=orders_PN.device)
        orders_PN = torch.cat((orders_PN, own_N[None]))  # row -1: the original order
        before_RN = orders_PN[[-1, *rows_R][: len(rows_R)]]
        positions_RN = torch.empty_like(before_RN).scatter_(
            1, before_RN, own_N.expand_as(before_RN)
        )
        return positions_RN.gather(1, orders_PN[rows_R])

    def _drop_path(self, x_BNC: Tensor) -> tuple[Tensor, ...] | None:
        """Factors of each pass's two branches, `[2, B, 1, 1]`; None if nothing is dropped.

        They are drawn for all images of a batch, even if the call gets only a part of them.
        "Deep Networks with Stochastic Depth", Huang et al., 2016.
        """
        if not self.training or not any(self.drop_path_rates):
            return None
        keep_P111 = 1 - torch.tensor(self.drop_path_rates, device=x_BNC.device).view(-1, 1, 1, 1)
        images = len(x_BNC) if self.places is None else self.batch_images
        noise_P2B1 = torch.rand(
            len(keep_P111), 2, images, 1, device=x_BNC.device, generator=self.generator
        )
        if self.places is not None:
            noise_P2B1 = noise_P2B1.index_select(2, self.places)
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
    """One layer: puts the tokens into the order given, if any, and runs a block and its NLL."""
    if order_N is not None:
        x_BNC = x_BNC.index_select(1, order_N)
    x_BNC = block(x_BNC, slices, drop_2B11, lrc_4)
    return x_BNC if nll is None else nll(x_BNC)


def fixed_permutations(count: int, tokens: int, seed: int) -> Tensor:
    """`[count, tokens]`: permutations; each depends only on the seed and its row number."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator, device="cpu") for _ in range(count)]
    return torch.stack(rows) if rows else torch.empty(0, tokens, dtype=torch.long)
