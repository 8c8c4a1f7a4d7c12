"""Distillation: what a teacher's outputs add to the loss of a classifier.

soft     its probabilities at a temperature: Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531
hard     its most likely class: Touvron et al. 2021 (DeiT), https://arxiv.org/abs/2012.12877, eq. 3
feature  its last feature map, through a learned projection: Romero et al. 2015 (FitNets),
         https://arxiv.org/abs/1412.6550, with cosine similarity instead of the L2 distance
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from recipes.config import ConfigError
from recipes.data import Data
from recipes.teacher import Teacher


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of probabilities at temperature T, the mean over images; logits are (B, classes)."""
    student, teacher = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy with the teacher's most likely class; logits are (B, classes)."""
    return F.cross_entropy(student, teacher.argmax(-1))


def feature(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine between the channels of maps (B, C, h, w), the mean over positions; the teacher's map is resized."""
    # not the student's: on GPUs the gradient of interpolation is not deterministic
    teacher = F.interpolate(teacher.float(), student.shape[-2:], mode="bilinear", antialias=True)
    return (1 - F.cosine_similarity(student.float(), teacher, dim=1)).mean()


class Matched(nn.Module):
    """A student that returns logits (B, classes) and its last map (B, C, h, w), projected to a teacher's width."""

    def __init__(self, model: nn.Module, width: int):
        super().__init__()
        self.model = model
        self.beside = nn.Conv2d(model.feature_info[-1]["num_chs"], width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        last, (features,) = self.model.forward_intermediates(images, indices=1)
        return self.model.forward_head(last), self.beside(features)


Outputs = Tensor | tuple[Tensor, Tensor]  # of the learner: logits, with features if these are matched


class Distillation:
    """The loss of a student: (1 - `teacher.weight`) of its own and `teacher.weight` of the distillation loss."""

    def __init__(self, cfg: DictConfig, teacher: Teacher):
        self.kind, self.weight, self.temperature = cfg.kind, cfg.weight, cfg.temperature
        self.teacher = teacher

    def learner(self, model: nn.Module) -> nn.Module:
        """What is called and trained in place of the model."""
        return Matched(model, self.teacher.width) if self.kind == "feature" else model

    def __call__(self, outputs: Outputs, images: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of the learner's outputs for these images; `own` is the loss of logits without a teacher."""
        there = next(self.teacher.buffers(), images).device
        if there != images.device:  # moving what is there already takes milliseconds too
            self.teacher.to(images.device)
        logits = outputs[0] if self.kind == "feature" else outputs
        return (1 - self.weight) * own(logits) + self.weight * self._told(outputs, images)

    def _told(self, outputs: Outputs, images: Tensor) -> Tensor:
        if self.kind == "feature":
            return feature(outputs[1], self.teacher.features(images))
        answers = self.teacher(images)
        return hard(outputs, answers) if self.kind == "hard" else soft(outputs, answers, self.temperature)


def create(cfg: DictConfig, data: Data, student: nn.Module) -> Distillation | None:
    """The distillation of cfg.teacher, None without a teacher; cfg is the whole configuration.

    Raises ConfigError for a teacher with other classes, and for a model without the maps that kind=feature needs.
    """
    if cfg.teacher.kind is None:
        return None
    teacher = Teacher.create(cfg.teacher, data)
    if cfg.teacher.kind == "feature":
        for model, name in ((student, cfg.model.name), (teacher.model, teacher.name)):
            if not (hasattr(model, "forward_intermediates") and getattr(model, "feature_info", None)):
                raise ConfigError(f"teacher.kind=feature needs feature maps, and {name} gives none: use soft or hard")
    else:
        teacher.check_classes(student.num_classes, data.class_names)
    return Distillation(cfg.teacher, teacher)
