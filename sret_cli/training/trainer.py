"""A model in training: one step, and all that a step changes, as a state to save and load."""

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sret_cli import __version__
from sret_cli.cost.memory import set_recompute
from sret_cli.data.loaders import Batches, Loader
from sret_cli.model.compile import compile_model
from sret_cli.model.kinds import build_any, set_recursions, sret_stages
from sret_cli.runtime.device import autocast, device_name
from sret_cli.runtime.errors import SOME_FAILED, SretError, show_note
from sret_cli.runtime.processes import places_of_rank
from sret_cli.spec.run import Row, Run
from sret_cli.training.checkpoint import Checkpoint, State, random_states, set_random_states
from sret_cli.training.config import refuse_other_config
from sret_cli.training.distill import create_distillation
from sret_cli.training.optimizer import (
    create_ema,
    create_mixup,
    create_optimizer,
    create_schedule,
    draw_recursions,
    mix_batch,
    set_rate,
    step_seed,
)
from sret_cli.training.parallel import (
    full_state,
    full_tensor,
    load_full_optimizer_state,
    load_full_state,
    replicate,
    shard,
    synchronise_norms,
)
from sret_cli.training.ranks import ALONE, Ranks
from sret_cli.weights.store import load_weights


class Diverged(SretError):
    """A loss or a gradient is not finite, on all ranks."""


@dataclass
class TrainingProgress:
    """How far a training is: plain values, all of them in its checkpoints.

    `batch` counts the batches of the epoch that are done, `loss_sum` sums their losses, and
    `results` is the last evaluation's part of the row. `seconds` are those of training alone.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    results: Row = field(default_factory=dict)
    bad_images: list[str] = field(default_factory=list)


class Trainer:
    """A model, its optimiser, schedule and averaged weights, and how far they are.

    Everything drawn in a step is drawn from the seed and the step, so that a step done again from
    the same state gives the same weights, and several ranks, or several parts of a batch, draw what
    one process does for a whole batch: all but dropout, and the drop path of timm's models, which
    each rank and each part draws for itself. `model` is what a step calls, `module` what is
    evaluated and saved: they differ once `join` has been called.

    Raises:
        SretError: the spec asks for what cannot be.
    """

    def __init__(
        self,
        run: Run,
        loader: Loader,
        device: torch.device,
        gpu_memory: int | None = None,
        ranks: Ranks = ALONE,
        shards: bool = False,
    ) -> None:
        assert run.train is not None
        self.run, self.spec, self.loader = run, run.train, loader
        self.device, self.ranks, self.shards = device, ranks, shards
        torch.manual_seed(self.spec.seed)
        self.module = build_any(run.model).to(device)
        if self.spec.init is not None:
            init = Path(self.spec.init)
            load_weights(self.module, init, loader.class_list, self.spec.reset_head)
        set_recompute(self.module, self.spec, device, gpu_memory, ranks.world_size)
        if self.spec.recursions_range is not None:
            most = self.spec.recursions_range[1]
            set_recursions(self.module, most, "train.recursions_range: this run")
        self.model: nn.Module = self.module
        self.ema = create_ema(self.module, self.spec)
        if ranks.is_distributed:
            synchronise_norms(self.module)
        if shards:
            shard(self.module, ranks)
            if self.ema is not None:
                shard(self.ema.module, ranks)
                self.ema.foreach = (
                    False  # which does not take them beside the buffers, which are not
                )
        self.optimizer = create_optimizer(self.module, self.spec)
        self.schedule = create_schedule(self.optimizer, self.spec, len(loader))
        set_rate(self.schedule, 0, len(loader))
        self.mixup = create_mixup(self.spec, run.model.num_classes)
        self.distillation = create_distillation(self.spec, run.model, device, loader.class_list)
        compile_model(
            self.module,
            self.spec.compile,
            lambda why: show_note(f"not compiled: {why}") if ranks.is_leader else None,
            stem=not ranks.is_distributed,
        )
        self.generator = torch.Generator(device)
        in_parts = ranks.is_distributed or self.spec.accumulation > 1
        self.stages = sret_stages(self.module) if in_parts else []
        for stage in self.stages:
            stage.generator = self.generator
        self.progress = TrainingProgress()
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.whole = True  # no step is under way

    def models(self) -> list[Any]:
        """What is evaluated and saved: the model and, where there are any, the averaged weights."""
        return [self.module] + ([] if self.ema is None else [self.ema.module])

    def join(self) -> None:
        """Has each step average the gradients of all ranks, which have to be this far."""
        if self.ranks.is_distributed and not self.shards:
            self.model = replicate(self.module, self.spec, self.ranks)

    @property
    def lr(self) -> float:
        """The learning rate of the next step: that of the layers that have the largest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def last_lr(self) -> float:
        """The learning rate of the step that was done last."""
        set_rate(self.schedule, max(self.progress.step - 1, 0), len(self.loader))
        rate = self.lr
        set_rate(self.schedule, self.progress.step, len(self.loader))
        return rate

    def step(self, images: Tensor, target: Tensor, counts: tuple[int, ...] = ()) -> float:
        """One step of the optimiser on a batch; returns its loss.

        Args:
            images: `[B, C, Y, X]`, as the loader gives them: this rank's.
            target: `[B]`.
            counts: how many images each rank has, where there are several.

        Raises:
            Diverged: the loss or the gradient is not finite; nothing has changed.
        """
        self.whole = False
        p, counts = self.progress, counts or (len(images),)
        self.generator.manual_seed(step_seed(self.spec.seed, p.step, self.ranks.rank))
        if self.spec.recursions_range is not None:
            self.module.set_recursions(draw_recursions(self.spec, p.step))
        x = self.loader.normalize(images.to(self.device, non_blocking=True))
        target = target.to(self.device, non_blocking=True)
        if self.mixup is not None:
            x, target = mix_batch(self.mixup, x, target)
        with ExitStack() as undoing:
            undoing.callback(self._undo, [buffer.clone() for buffer in self.statistics])
            loss, parameters, norm = self._backward(x, target, counts)
            undoing.pop_all()
        if self.spec.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.spec.clip_grad, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # not to be there in the next forward pass
        if self.ema is not None:
            self.ema.update(self.module, p.step + 1 if self.spec.model_ema_warmup else None)
        p.step += 1
        p.batch += 1
        p.images += sum(counts)
        p.loss_sum += loss
        set_rate(self.schedule, p.step, len(self.loader))
        return loss

    def _undo(self, statistics: list[Tensor]) -> None:
        """Has a step that failed before the optimiser's change nothing."""
        for buffer, old in zip(self.statistics, statistics, strict=True):
            buffer.copy_(old)
        self.optimizer.zero_grad(set_to_none=True)
        self.whole = True

    def _backward(
        self, x: Tensor, target: Tensor, counts: tuple[int, ...]
    ) -> tuple[float, list[nn.Parameter], Tensor]:
        """Loss, parameters with a gradient and its norm: the same on all ranks."""
        count, parts = sum(counts), min(self.spec.accumulation, *counts)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        state = self.generator.get_state()
        pieces = zip(
            *(t.tensor_split(parts) for t in (x, target, self._places(counts))), strict=True
        )
        for number, (x_part, target_part, places) in enumerate(pieces, 1):
            if self.stages:
                self._draw_for(places, count, state)
            # The ranks are averaged, and an image counts the same if one has more than another.
            weight = len(x_part) * self.ranks.world_size / count
            with self._averaging(number == parts):
                part = self.loss(x_part, target_part) * weight
                part.backward()
            loss += part.detach()
        loss = self.ranks.sum(loss) / self.ranks.world_size
        parameters = [q for q in self.module.parameters() if q.grad is not None]
        norm = full_tensor(
            nn.utils.get_total_norm([q.grad for q in parameters if q.grad is not None])
        )
        step, lr = self.progress.step + 1, self.lr
        # One transfer from the device for both.
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        if not math.isfinite(loss_value):
            raise self.diverged(f"loss is {loss_value}", step, lr)
        if not math.isfinite(norm_value):
            raise self.diverged(f"norm of the gradient is {norm_value}", step, lr)
        return loss_value, parameters, norm

    def _places(self, counts: tuple[int, ...]) -> Tensor:
        """Where this rank's images are in the whole batch, in the order that it has them in."""
        count, rank = sum(counts), self.ranks.rank
        parts = self.spec.accumulation if count == self.spec.batch_size else 1
        places = places_of_rank(count, rank, self.ranks.world_size, parts)
        if len(places) != counts[rank]:  # some images were left out
            places = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
        return torch.tensor(places)

    def _draw_for(self, places: Tensor, count: int, state: Tensor) -> None:
        """Has the stages draw for a batch of `count` images, of which they get those at places."""
        self.generator.set_state(state)
        places = places.to(self.device)
        for stage in self.stages:
            stage.batch_images, stage.places = count, places

    def _averaging(self, last: bool) -> AbstractContextManager[Any]:
        """Where gradients are averaged over the ranks, if it is the last part of a step."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if self.shards:
            self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of normalised images: the cross-entropy with classes or with soft targets."""
        with autocast(self.device, self.spec.precision):
            output = self.model(x)
        if self.distillation is not None:
            return self.distillation.loss(output.float(), x, target)
        smoothing = self.spec.smoothing if self.mixup is None else 0.0  # which has smoothed them
        return F.cross_entropy(output.float(), target, label_smoothing=smoothing)

    def diverged(self, what: str, step: int, lr: float) -> Diverged:
        """The user's error for what is not finite at a step of that learning rate."""
        error = Diverged(
            f"diverged: the {what} at step {step} (epoch {self.progress.epoch + 1}, "
            f"lr {lr:.2g}); use a smaller train.lr or clip_grad",
            SOME_FAILED,
            status="diverged",
        )
        error.on_all_ranks, error.reported_here = True, self.ranks.is_leader
        return error

    def batch_indices(self) -> list[int]:
        """The indices of the next batch's images, of all ranks; a stream has none."""
        batches = self.loader.batches
        if not isinstance(batches, Batches):
            return []
        batches = copy(batches)
        batches.rank, batches.world_size = 0, 1
        batches.epoch, batches.start = self.progress.epoch, self.progress.batch
        return [key[1] for key in next(iter(batches))]

    def state(self) -> State:
        """All that a training needs to go on; tensors are the model's own, not copies.

        Where weights are sharded, they are gathered: all ranks have to ask.
        """
        state = {
            "config": self.run.spec(),
            "versions": self.versions(),
            "progress": asdict(self.progress),
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "random": random_states(),
        }
        return full_state(state) if self.shards else state

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """Goes on from a checkpoint; returns what is not as it was when it was written.

        The schedule follows from the step and from the epochs of this run, which may be more.

        Raises:
            SretError: it is of another run, or one that read other images, weights or labels.
        """
        state = checkpoint.state
        config = self.run.spec()
        if self.run.continues is not None:
            config["train"]["epochs"] = state["config"]["train"]["epochs"]
        refuse_other_config(str(checkpoint.path), state["config"], config)
        load_full_state(self.module, state["model"])
        load_full_optimizer_state(self.optimizer, state["optimizer"])
        if self.ema is not None:
            load_full_state(self.ema.module, state["ema"])
        self.progress = TrainingProgress(**state["progress"])
        set_rate(self.schedule, self.progress.step, len(self.loader))
        set_random_states(state["random"])
        versions = self.versions()
        return [
            f"{k} {v}, not {versions[k]}" for k, v in state["versions"].items() if v != versions[k]
        ]

    def versions(self) -> dict[str, Any]:
        """What the last digits of a training depend on, beside its spec."""
        return {
            "sret": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "device": device_name(self.device),
            "processes": self.ranks.world_size,
        }
