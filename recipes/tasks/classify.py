"""Image classification: one label an image."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from recipes import data, models, task
from recipes.plots import draw_confusion


class Metrics:
    """Top-1, top-5 where there are more than five classes, cross entropy and the confusion matrix.

    torchmetrics adds the counts of all processes up.
    """

    def __init__(self, classes: int):
        self.top = {1: MulticlassAccuracy(classes, top_k=1, average="micro")}
        if classes > 5:
            self.top[5] = MulticlassAccuracy(classes, top_k=5, average="micro")
        self.confusion = MulticlassConfusionMatrix(classes)
        self.loss = MeanMetric().set_dtype(torch.float64)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        logits, targets = predictions.float().cpu(), targets.cpu()
        for metric in (*self.top.values(), self.confusion):
            metric.update(logits, targets)
        self.loss.update(F.cross_entropy(logits.double(), targets, reduction="none"))

    def compute(self) -> dict[str, float]:
        """Accuracies in percent and the mean loss, of all processes, which must all come here."""
        self.confusion.compute()  # remembers its result for the picture, which one process draws
        values = {f"top{k}": round(100 * metric.compute().item(), 4) for k, metric in self.top.items()}
        return {**values, "loss": self.loss.compute().item()}


class Task(task.Task):
    """Classification with cross entropy, label smoothing, Mixup and CutMix."""

    score = "top1"

    def build_data(self) -> data.Data:
        built = data.build(self.cfg)
        if "augment" in self.cfg:  # an evaluation has none
            self.mix = data.Mix(self.cfg.augment, built.num_classes)
        return built

    def build_model(self, data: data.Data, *, pretrained: bool = True) -> nn.Module:
        return models.create(self.cfg, data, pretrained=pretrained)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, *, draw: int) -> Tensor:
        images, targets = self.mix(images, targets, seed=self.cfg.seed, step=draw)  # targets: (B, classes)
        return F.cross_entropy(model(images), targets)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images)  # (B, classes)

    def metrics(self, data: data.Data) -> Metrics:
        return Metrics(data.num_classes)

    def picture(self, path: Path, data: data.Data, metrics: Metrics) -> None:
        draw_confusion(path, metrics.confusion.compute(), data.class_names)
