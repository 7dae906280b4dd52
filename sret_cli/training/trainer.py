"""A model in training: one step, and the state that a step changes, to save and load."""

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
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
from sret_cli.data.loader import Loader
from sret_cli.model.compile import compile_model
from sret_cli.model.kinds import build_any, set_recursions, sret_stages
from sret_cli.runtime.device import autocast, device_name
from sret_cli.runtime.errors import show_note
from sret_cli.runtime.processes import places_of_rank
from sret_cli.spec.run import Run
from sret_cli.training.checkpoint import Checkpoint
from sret_cli.training.config import refuse_other_config
from sret_cli.training.distill import create_distillation
from sret_cli.training.divergence import Diverged
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
from sret_cli.training.state import State, TrainingProgress, random_states, set_random_states
from sret_cli.weights.store import load_weights


class Trainer:
    """A model, its optimizer, schedule and averaged weights, and how far they are.

    Every random number of a step follows from the seed and the step: a step that is repeated from
    the same state gives the same weights. Several ranks, or several parts of a batch, draw the same
    numbers as one process draws for the complete batch. Two exceptions: dropout, and the drop path
    of timm models, are drawn by each rank and each part separately.

    Attributes:
        module: the model that is evaluated and saved.
        model: what a step calls: `module`, or after `average_gradients` a wrapper of it.
        can_be_saved: False while a step or a load is under way, and its state is incomplete.

    Raises:
        SretError: the weights of `train.init` do not fit, or the spec cannot be trained.
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
            load_weights(
                self.module,
                Path(self.spec.init),
                classes=loader.class_list,
                reset_head=self.spec.reset_head,
            )
        set_recompute(
            self.module,
            self.spec,
            device=device,
            budget=gpu_memory,
            world_size=ranks.world_size,
        )
        if self.spec.recursions_range is not None:
            most = self.spec.recursions_range[1]
            set_recursions(self.module, most, "train.recursions_range: this run")
        self.model: nn.Module = self.module
        self.ema = create_ema(self.module, self.spec)
        if ranks.is_distributed:
            synchronise_norms(self.module)
        if shards:
            self._shard()
        self.optimizer = create_optimizer(self.module, self.spec)
        self.schedule = create_schedule(self.optimizer, self.spec, len(loader))
        set_rate(self.schedule, 0, len(loader))
        self.mixup = create_mixup(self.spec, run.model.num_classes)
        self.distillation = create_distillation(
            self.spec, student=run.model, device=device, classes=loader.class_list
        )
        compile_model(
            self.module,
            self.spec.compile,
            lambda why: show_note(f"not compiled: {why}") if ranks.is_leader else None,
            stem=not ranks.is_distributed,
        )
        self.generator = torch.Generator(device)
        self.stages = self._stages_with(self.generator)
        self.progress = TrainingProgress()
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.can_be_saved = True

    def _shard(self) -> None:
        shard(self.module, self.ranks)
        if self.ema is not None:
            shard(self.ema.module, self.ranks)
            # foreach kernels cannot mix sharded parameters with unsharded buffers
            self.ema.foreach = False

    def _stages_with(self, generator: torch.Generator) -> list[Any]:
        """The stages that draw for parts of a batch by this generator; else none."""
        in_parts = self.ranks.is_distributed or self.spec.accumulation > 1
        stages = sret_stages(self.module) if in_parts else []
        for stage in stages:
            stage.generator = generator
        return stages

    def models(self) -> list[Any]:
        """The models to evaluate and save: the model and, if the spec has them, its averages."""
        return [self.module] + ([] if self.ema is None else [self.ema.module])

    def average_gradients(self) -> None:
        """Makes each step average the gradients of all ranks; all ranks have to call this."""
        if self.ranks.is_distributed and not self.shards:
            self.model = replicate(self.module, self.spec, self.ranks)

    @property
    def lr(self) -> float:
        """The learning rate of the next step: the largest of all layers."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def last_lr(self) -> float:
        """The learning rate of the step before."""
        set_rate(self.schedule, max(self.progress.step - 1, 0), len(self.loader))
        rate = self.lr
        set_rate(self.schedule, self.progress.step, len(self.loader))
        return rate

    def step(self, images: Tensor, target: Tensor, counts: tuple[int, ...] = ()) -> float:
        """One step of the optimizer on a batch; returns its loss.

        Args:
            images: `[B, C, Y, X]`, this rank's images as the loader gives them.
            target: `[B]`.
            counts: the number of images of each rank; this rank's alone if empty.

        Raises:
            Diverged: the loss or the gradient is not finite; the state is unchanged.
        """
        self.can_be_saved = False
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
        self.optimizer.zero_grad(set_to_none=True)  # frees memory for the next forward pass
        if self.ema is not None:
            self.ema.update(self.module, p.step + 1 if self.spec.model_ema_warmup else None)
        p.step += 1
        p.batch += 1
        p.images += sum(counts)
        p.loss_sum += loss
        set_rate(self.schedule, p.step, len(self.loader))
        return loss

    def _undo(self, statistics: list[Tensor]) -> None:
        """Restores the state after a step that failed before the optimizer changed weights."""
        for buffer, old in zip(self.statistics, statistics, strict=True):
            buffer.copy_(old)
        self.optimizer.zero_grad(set_to_none=True)
        self.can_be_saved = True

    def _backward(
        self, x: Tensor, target: Tensor, counts: tuple[int, ...]
    ) -> tuple[float, list[nn.Parameter], Tensor]:
        """Loss, parameters with a gradient, and the gradient's norm: the same on all ranks."""
        count, parts = sum(counts), min(self.spec.accumulation, *counts)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        state = self.generator.get_state()
        pieces = zip(
            x.tensor_split(parts),
            target.tensor_split(parts),
            self._places(counts).tensor_split(parts),
            strict=True,
        )
        for number, (x_part, target_part, places) in enumerate(pieces, 1):
            if self.stages:
                self._draw_for(places, count, state)
            # Gradients are averaged over ranks; this factor gives every image the same weight, also
            # where one rank has more images than another.
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
        # Stacked, so that the device is waited for once.
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        for name, value in (("loss", loss_value), ("norm of the gradient", norm_value)):
            if not math.isfinite(value):
                p = self.progress
                raise Diverged(f"{name} is {value}", step=p.step + 1, epoch=p.epoch + 1, lr=self.lr)
        return loss_value, parameters, norm

    def _places(self, counts: tuple[int, ...]) -> Tensor:
        """The positions of this rank's images in the complete batch, in the rank's order."""
        count, rank = sum(counts), self.ranks.rank
        parts = self.spec.accumulation if count == self.spec.batch_size else 1
        places = places_of_rank(count, rank, world_size=self.ranks.world_size, parts=parts)
        if len(places) != counts[rank]:  # some images were left out
            places = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
        return torch.tensor(places)

    def _draw_for(self, places: Tensor, count: int, state: Tensor) -> None:
        """Makes the stages draw for a batch of `count` images and use the numbers at `places`."""
        self.generator.set_state(state)
        places = places.to(self.device)
        for stage in self.stages:
            stage.batch_images, stage.places = count, places

    def _averaging(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a backward pass; the `last` part of a step averages over the ranks."""
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
        smoothing = self.spec.smoothing if self.mixup is None else 0.0  # mixup smooths its targets
        return F.cross_entropy(output.float(), target, label_smoothing=smoothing)

    def state(self) -> State:
        """Everything that is needed to resume; the tensors are the model's own, not copies.

        Sharded weights are gathered, so all ranks have to call this.
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
        """Resumes from a checkpoint; returns which versions or devices were others then.

        The schedule follows from the step and this run's epochs, which may be more than before.

        Raises:
            SretError: the checkpoint is of another run, or of other images, weights or labels.
        """
        state = checkpoint.state
        config = self.run.spec()
        if self.run.continues is not None:
            config["train"]["epochs"] = state["config"]["train"]["epochs"]
        refuse_other_config(str(checkpoint.path), state["config"], config)
        self.can_be_saved = False
        load_full_state(self.module, state["model"])
        load_full_optimizer_state(self.optimizer, state["optimizer"])
        if self.ema is not None:
            load_full_state(self.ema.module, state["ema"])
        self.progress = TrainingProgress(**state["progress"])
        set_rate(self.schedule, self.progress.step, len(self.loader))
        set_random_states(state["random"])
        self.can_be_saved = True
        versions = self.versions()
        return [
            f"{k} {v}, not {versions[k]}" for k, v in state["versions"].items() if v != versions[k]
        ]

    def versions(self) -> dict[str, Any]:
        """What the last digits of the losses depend on, besides the spec."""
        return {
            "sret": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "device": device_name(self.device),
            "processes": self.ranks.world_size,
        }
