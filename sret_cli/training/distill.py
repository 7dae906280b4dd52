"""Distillation: the teacher's probabilities for an image replace the class of the image.

The loss is the cross-entropy of the teacher's and the student's probabilities, as SReT was trained
(MEAL V2, arXiv 2009.08453; Fast Knowledge Distillation, arXiv 2112.01528). They are published at
temperature 1. At another temperature, both logits are divided by it and the loss is not rescaled.
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
    """The loss of a training that distills from a teacher or from stored labels; has no state.

    Raises:
        SretError: the teacher cannot be loaded, or has other classes or channels than the student.
    """

    def __init__(
        self,
        train: TrainSpec,
        student: Spec,
        device: torch.device,
        classes: ClassList | None = None,
    ) -> None:
        self.temperature = train.distill_temperature
        self.teacher = (
            None
            if train.teacher is None
            else Teacher(train, student=student, device=device, classes=classes)
        )

    def loss(self, output: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy of the student's logits `[B, classes]`.

        Args:
            output: the student's logits, in float32.
            x: the student's images, normalised, and mixed if the training mixes images.
            target: stored labels `[B, 2, top_k]`; ignored with a teacher.
        """
        if self.teacher is None:
            soft = spread_probabilities(target, output.shape[1])
        else:
            soft = (self.teacher(x) / self.temperature).softmax(1)
        return F.cross_entropy(output / self.temperature, soft)


def create_distillation(
    train: TrainSpec, student: Spec, device: torch.device, classes: ClassList | None = None
) -> Distillation | None:
    """The loss of a training that distills, on images of these classes; else None."""
    distills = train.teacher is not None or train.soft_labels is not None
    if not distills:
        return None
    return Distillation(train, student=student, device=device, classes=classes)
