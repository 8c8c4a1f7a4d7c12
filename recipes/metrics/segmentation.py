"""Intersection over union and accuracies of label maps, from one confusion matrix over the whole set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from recipes.data import DataError
from recipes.data.paired import IGNORE
from recipes.metrics.confusion import Confusion
from zoo.heads.layers import resize

SHOWN = 6  # predictions that are kept for a picture


class Segmentation:
    """mIoU, mean and overall accuracy in percent, IoU of each class, and mean cross entropy over labelled pixels.

    left_out  classes that are predicted like others but do not count in the means over classes
    Each image is evaluated at its own size: logits are resized to the label map before the argmax.
    """

    def __init__(self, names: Sequence[str], left_out: Sequence[int] = ()):
        self.names, self.left_out = names, left_out
        self.confusion = Confusion(len(names), IGNORE)
        self.loss = MeanMetric(math.inf).set_dtype(torch.float64)  # a NaN is no image to leave out
        self.shown: list[tuple[Tensor, dict[str, Any]]] = []  # (H, W) predicted labels, target

    def update(self, predictions: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> None:
        """`predictions` are logits (classes, h, w); a target holds `labels`, (H, W) int64."""
        for logits, target in zip(predictions, targets, strict=True):
            true = target["labels"].to(logits.device)
            logits = at_size(logits.float(), true.shape)
            found = logits.argmax(0)
            self.confusion.update(found.cpu(), true.cpu())
            if counted := int((true != IGNORE).sum()):
                # its own mean would use atomics on a GPU, in no fixed order
                entropy = F.cross_entropy(logits[None], true[None], ignore_index=IGNORE, reduction="none")
                self.loss.update(entropy.sum().cpu().double() / counted, weight=counted)
            if len(self.shown) < SHOWN:
                self.shown.append((found.cpu(), {**target, "labels": true.cpu()}))

    def compute(self) -> dict[str, float]:
        """Metrics over all processes, which must all call this. Raises DataError if no pixel counts in the means."""
        counts = self.confusion.compute()
        if not counts.sum():
            raise DataError("no pixel of the validation set is labelled: there is nothing to evaluate")
        if not counts[[index for index in range(len(self.names)) if index not in self.left_out]].sum():
            raise DataError(
                "all labelled pixels of the validation set are of classes in data.left_out "
                f"({', '.join(self.names[index] for index in self.left_out)}): there is nothing to evaluate"
            )
        return {**scores(counts, self.names, self.left_out), "loss": self.loss.compute().item()}


def at_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(classes, h, w) -> (classes, *size), bilinearly."""
    return resize(logits[None], tuple(size))[0]


def scores(counts: Tensor, names: Sequence[str], left_out: Sequence[int]) -> dict[str, float]:
    """`miou`, `macc`, `aacc` and `iou/<name>` in percent.

    IoU is right / (true + found - right). A class that is neither true nor found anywhere has none and is in no mean;
    accuracy (right / true) is that of classes that occur. `aacc` counts all pixels, also those of left-out classes.
    """
    right, true, found = counts.diagonal().double(), counts.sum(1).double(), counts.sum(0).double()
    iou, accuracy = 100 * right / (true + found - right), 100 * right / true  # 0 / 0 is nan
    kept = torch.ones(len(names), dtype=torch.bool)
    kept[list(left_out)] = False
    means = {"miou": iou[kept].nanmean(), "macc": accuracy[kept].nanmean(), "aacc": 100 * right.sum() / true.sum()}
    each = {f"iou/{name}": value for name, value in zip(names, iou, strict=True) if not value.isnan()}
    return {key: round(value.item(), 4) for key, value in (means | each).items()}
