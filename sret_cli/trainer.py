"""A model in training: one step, and all that a step changes, as a state to save and load."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sret_cli import __version__
from sret_cli.checkpoint import Checkpoint, State, random_states, set_random_states
from sret_cli.compilation import compile_model
from sret_cli.data import Batches, Loader
from sret_cli.distill import create_distillation
from sret_cli.errors import CHECKPOINT, SOME_FAILED, SretError, note
from sret_cli.evaluate import autocast
from sret_cli.measure import device_name
from sret_cli.memory import set_recompute
from sret_cli.optimizer import (
    create_ema,
    create_mixup,
    create_optimizer,
    create_schedule,
    drawn_recursions,
    seed_step,
)
from sret_cli.records import Row, refuse_other_config
from sret_cli.recurse import build_any
from sret_cli.study import Run
from sret_cli.weights import load_weights


class Diverged(SretError):
    """A loss or a gradient is not finite."""


@dataclass
class Progress:
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

    Everything drawn in a step is drawn from the seed, the step and the rank, so that a step done
    again from the same state gives the same weights. `model` is what a step calls, `module` what is
    evaluated and saved: they differ once something is wrapped around the module.

    Raises:
        SretError: the spec asks for what cannot be.
    """

    def __init__(
        self,
        run: Run,
        loader: Loader,
        device: torch.device,
        rank: int = 0,
        gpu_memory: int | None = None,
    ) -> None:
        assert run.train is not None
        self.run, self.spec, self.loader = run, run.train, loader
        self.device, self.rank = device, rank
        torch.manual_seed(self.spec.seed)
        self.module = build_any(run.model).to(device)
        if self.spec.init is not None:
            load_weights(self.module, Path(self.spec.init))
        set_recompute(self.module, self.spec, device, gpu_memory)
        if self.spec.recursions_range is not None:
            self.module.set_recursions(self.spec.recursions_range[1])  # refuses what has no weights
        self.model: nn.Module = self.module
        self.optimizer = create_optimizer(self.module, self.spec)
        self.schedule = create_schedule(self.optimizer, self.spec, len(loader))
        self.schedule.step_update(0)
        self.mixup = create_mixup(self.spec, run.model.num_classes)
        self.distillation = create_distillation(self.spec, run.model, device)
        self.ema = create_ema(self.module, self.spec)
        compile_model(self.module, self.spec.compile, lambda why: note(f"not compiled: {why}"))
        self.progress = Progress()
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.whole = True  # no step is under way

    @property
    def lr(self) -> float:
        """The learning rate of the next step: that of the layers that have the largest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def step(self, images: Tensor, target: Tensor) -> float:
        """One step of the optimiser on a batch; returns its loss.

        Args:
            images: `[B, C, Y, X]`, as the loader gives them.
            target: `[B]`.

        Raises:
            Diverged: the loss or the gradient is not finite; nothing has changed.
        """
        self.whole = False
        p = self.progress
        seed_step(self.spec.seed, p.step, self.rank)
        if self.spec.recursions_range is not None:
            self.module.set_recursions(drawn_recursions(self.spec, p.step))
        x = self.loader.normalize(images.to(self.device, non_blocking=True))
        target = target.to(self.device, non_blocking=True)
        if self.mixup is not None:
            x, target = self.mixup(x, target)
        before = [buffer.clone() for buffer in self.statistics]
        try:
            loss, parameters, norm = self._backward(x, target)
        except Exception:  # whatever it is, nothing has changed
            for buffer, old in zip(self.statistics, before, strict=True):
                buffer.copy_(old)
            self.optimizer.zero_grad(set_to_none=True)
            self.whole = True
            raise
        if self.spec.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.spec.clip_grad, norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module)
        p.step += 1
        p.batch += 1
        p.images += len(x)
        p.loss_sum += loss
        self.schedule.step_update(p.step)
        return loss

    def _backward(self, x: Tensor, target: Tensor) -> tuple[float, list[nn.Parameter], Tensor]:
        """Loss, parameters with a gradient and its norm; what all ranks must agree on is here."""
        parts = self.spec.accumulation
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for x_part, target_part in zip(x.chunk(parts), target.chunk(parts), strict=True):
            part = self.loss(x_part, target_part) * (len(x_part) / len(x))
            part.backward()
            loss += part.detach()
        parameters = [q for q in self.module.parameters() if q.grad is not None]
        norm = nn.utils.get_total_norm([q.grad for q in parameters if q.grad is not None])
        # One transfer from the device for both.
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        if not math.isfinite(loss_value):
            raise self.diverged(f"loss is {loss_value}", self.progress.step + 1)
        if not math.isfinite(norm_value):
            raise self.diverged(f"norm of the gradient is {norm_value}", self.progress.step + 1)
        return loss_value, parameters, norm

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of normalised images: the cross-entropy with classes or with soft targets."""
        with autocast(self.device, self.spec.precision):
            output = self.model(x)
        if self.distillation is not None:
            return self.distillation.loss(output.float(), x, target)
        smoothing = self.spec.smoothing if self.mixup is None else 0.0  # which has smoothed them
        return F.cross_entropy(output.float(), target, label_smoothing=smoothing)

    def diverged(self, what: str, step: int) -> Diverged:
        """The user's error for what is not finite at a step."""
        return Diverged(
            f"diverged: the {what} at step {step} (epoch {self.progress.epoch + 1}, "
            f"lr {self.lr:.2g}); use a smaller train.lr or clip_grad",
            SOME_FAILED,
            status="diverged",
        )

    def batch_indices(self) -> list[int]:
        """The indices of the next batch's images in the data set; a stream has none."""
        batches = self.loader.batches
        if not isinstance(batches, Batches):
            return []
        batches.epoch, batches.start = self.progress.epoch, self.progress.batch
        return [key[1] for key in next(iter(batches))]

    def state(self) -> State:
        """All that a training needs to go on; tensors are the model's own, not copies."""
        return {
            "config": self.run.spec(),
            "versions": self.versions(),
            "steps_per_epoch": len(self.loader),
            "progress": asdict(self.progress),
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "random": random_states(),
        }

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """Goes on from a checkpoint; returns what is not as it was when it was written.

        The schedule follows from the step and from the epochs of this run, which may be more.

        Raises:
            SretError: it is of another run, or the data have changed.
        """
        state = checkpoint.state
        config = self.run.spec()
        if self.run.continues is not None:
            config["train"]["epochs"] = state["config"]["train"]["epochs"]
        refuse_other_config(str(checkpoint.path), state["config"], config)
        if state["steps_per_epoch"] != len(self.loader):
            raise SretError(
                f"{checkpoint.path} is of a training with {state['steps_per_epoch']:,} steps an "
                f"epoch, and these data have {len(self.loader):,}; put the images back, or remove "
                f"{checkpoint.path.parent} to start over",
                CHECKPOINT,
            )
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.progress = Progress(**state["progress"])
        self.schedule.step_update(self.progress.step)
        set_random_states(state["random"])
        now = self.versions()
        return [f"{k} {v}, not {now[k]}" for k, v in state["versions"].items() if v != now[k]]

    def versions(self) -> dict[str, Any]:
        """What the last digits of a training depend on, beside its spec."""
        return {
            "sret": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "device": device_name(self.device),
        }
