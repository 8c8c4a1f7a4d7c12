"""Accuracies of the most likely classes, their loss, and which classes are confused."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from recipes import distributed
from recipes.data import DataError
from recipes.metrics.confusion import Confusion

MOST = 5_000  # classes up to which a confusion matrix is kept, 200 MB of them; ImageNet-21k's would have 3.8 GB


class Metrics:
    """Top-1, top-5 if there are more than five classes, cross entropy and, up to `MOST` classes, the confusion matrix.

    torchmetrics sums the counts of all processes.

    subset  the model's classes that labels index, the only ones that are predicted; None for all
    """

    def __init__(self, classes: int, subset: tuple[int, ...] | None = None):
        self.subset = subset
        self.top = {1: MulticlassAccuracy(classes, top_k=1, average="micro")}
        if classes > 5:
            self.top[5] = MulticlassAccuracy(classes, top_k=5, average="micro")
        self.confusion = Confusion(classes) if classes <= MOST else None
        self.loss = MeanMetric(math.inf).set_dtype(torch.float64)  # a NaN is no image to leave out
        self.confidence = MeanMetric(0.0)  # nor is it confidence

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        logits, targets = among(predictions.float().cpu(), self.subset), targets.cpu()
        for metric in self.top.values():
            metric.update(logits, targets)
        if self.confusion is not None:
            self.confusion.update(logits.argmax(-1), targets)
        self.loss.update(F.cross_entropy(logits.double(), targets, reduction="none"))
        self.confidence.update(logits.softmax(-1).amax(-1))

    def compute(self) -> dict[str, float]:
        """Accuracies in percent and the mean loss over all processes, which must all call this."""
        if self.confusion is not None:
            self.confusion.compute()  # keeps its result for the picture, which one process draws
        self.confidence.compute()
        return {**accuracies(self.top), "loss": self.loss.compute().item()}


def among(logits: Tensor, subset: tuple[int, ...] | None) -> Tensor:
    """(B, classes) of (B, the model's classes): those of the subset, if there is one."""
    return logits if subset is None else logits[:, list(subset)]


def likeliest(logits: Tensor, most: int) -> Tensor:
    """(B, most) indices of the largest logits (B, classes), or of all; of equal ones the first comes first.

    argmax takes that one, which topk does not promise; in bfloat16 the two largest are often equal.
    """
    places = logits.topk(min(most, logits.shape[1])).indices.sort(-1).values
    order = logits.gather(1, places).sort(dim=-1, descending=True, stable=True).indices
    return places.gather(1, order)


def of_model(places: Tensor, subset: tuple[int, ...] | None) -> Tensor:
    """The model's classes at these places of the subset."""
    return places if subset is None else torch.tensor(subset)[places]


def accuracies(metrics: dict[int, Metric]) -> dict[str, float]:
    """Accuracies in percent, by the number of most likely classes that count."""
    return {f"top{k}": round(100 * metric.compute().item(), 4) for k, metric in metrics.items()}


class RealMetrics:
    """Top-1 and top-5 where any label of an image is correct; images without labels do not count (Beyer et al. 2020).

    truths  (N, most), padded with -1; targets are its rows
    subset  the classes that are predicted, as for Metrics
    """

    confusion = None  # with several labels an image belongs to no single row

    def __init__(self, truths: Tensor, subset: tuple[int, ...] | None):
        self.truths, self.subset = truths, subset
        self.top = {1: MeanMetric(), 5: MeanMetric()}
        self.scored = 0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        truths = self.truths[targets.cpu()]  # (B, most)
        labelled = truths[:, 0] >= 0
        logits, truths = predictions.float().cpu()[labelled], truths[labelled]
        self.scored += len(truths)
        classes = of_model(likeliest(among(logits, self.subset), max(self.top)), self.subset)
        right = (classes.unsqueeze(2) == truths.unsqueeze(1)).any(2)  # (B, 5)
        for k, metric in self.top.items():
            metric.update(right[:, :k].any(1).float())

    def compute(self) -> dict[str, float]:
        """As of Metrics, and how many images count. Raises DataError if none does."""
        scored = distributed.total(self.scored)
        if not scored:
            raise DataError("no image of the validation set has a label in ReaL: there is nothing to evaluate")
        return {**accuracies(self.top), "scored": scored}
