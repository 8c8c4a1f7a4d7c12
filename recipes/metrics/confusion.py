"""The confusion matrix of a whole validation set, of images or of pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Confusion(Metric):
    """(classes, classes) int64 counts, rows are true classes; torchmetrics sums those of all processes.

    With deterministic algorithms torchmetrics' own would compare every sample with every pair of classes: gigabytes for
    a batch of ImageNet's 1000 classes. Here a batch allocates only its own size.

    ignore  samples of this true class are not counted; None counts all
    """

    full_state_update = False

    def __init__(self, classes: int, ignore: int | None = None):
        super().__init__()
        self.classes, self.ignore = classes, ignore
        self.add_state("counts", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Tensor, true: Tensor) -> None:
        """Predicted and true classes of one shape, int64."""
        if found.numel() and int(found.max()) >= self.classes:
            raise ValueError(f"class {int(found.max())} was predicted, of {self.classes}: the model is for other data")
        counted = slice(None) if self.ignore is None else true != self.ignore
        pairs = (true[counted] * self.classes + found[counted]).flatten()
        self.counts.view(-1).index_add_(0, pairs, torch.ones_like(pairs))  # integers: exact in any order

    def compute(self) -> Tensor:
        return self.counts
