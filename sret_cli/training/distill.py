"""Distillation with soft labels alone: what a teacher says of an image takes its class's place.

The loss is the cross-entropy of the teacher's and the student's probabilities, as SReT was trained
(MEAL V2, arXiv 2009.08453; Fast Knowledge Distillation, arXiv 2112.01528): published at temperature
1; at others both logits are divided by it, and the loss has no factor for it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sret_cli.data.class_names import ClassList
from sret_cli.data.soft_labels import spread_probabilities
from sret_cli.spec.backbone import Spec
from sret_cli.spec.train import TrainSpec
from sret_cli.training.teacher import Teacher


class Distillation:
    """The loss of a training that distills, from a teacher or from stored labels; no state of it.

    Raises:
        SretError: the teacher cannot be had, or has other classes or channels than the student.
    """

    def __init__(
        self,
        train: TrainSpec,
        student: Spec,
        device: torch.device,
        classes: ClassList | None = None,
    ) -> None:
        self.temperature = train.distill_temperature
        self.teacher = None if train.teacher is None else Teacher(train, student, device, classes)

    def loss(self, output: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy of the student's logits `[B, classes]`.

        Args:
            output: the student's logits, in float32.
            x: the student's images, normalised, mixed where they are to be.
            target: stored labels `[B, 2, top_k]`; with a teacher, anything.
        """
        if self.teacher is None:
            soft = spread_probabilities(target, output.shape[1])
        else:
            soft = (self.teacher(x) / self.temperature).softmax(1)
        return F.cross_entropy(output / self.temperature, soft)


def create_distillation(
    train: TrainSpec, student: Spec, device: torch.device, classes: ClassList | None = None
) -> Distillation | None:
    """The loss of a training that distills, on images of these classes; None for any other."""
    distills = train.teacher is not None or train.soft_labels is not None
    return Distillation(train, student, device, classes) if distills else None
