"""One split of a data set: records, a transform, and the law that makes a sample repeatable."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.data.errors import DataError
from recipes.data.seeding import Stream, preserved, reseed


class Records(Protocol):
    """Where images lie: what a data set must offer."""

    labels: np.ndarray  # (N,) int64

    def image(self, index: int) -> Image.Image:
        """The image as 8-bit RGB; raises DataError naming it if it cannot be read."""

    def where(self, index: int) -> str:
        """What an error message calls the record: a path, or a file and a row."""


class Source(Dataset):
    """A map-style split, read by index.

    `sample(index, epoch)` depends on (seed, epoch, index) alone, not on the process or what was read before.
    """

    def __init__(self, records: Records, transform: Callable[[Image.Image], Tensor], *, name: str, seed: int):
        self.records, self.transform = records, transform
        self.name, self.seed = name, seed
        self.idle: dict[int, DataLoader] = {}  # number of workers -> a loader whose workers wait for the next epoch

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"idle": {}}  # a worker's copy starts no workers of its own

    def __len__(self) -> int:
        return len(self.records.labels)

    def image(self, index: int) -> Image.Image:
        """The image before the transform, RGB; raises DataError if it cannot be read."""
        return self.records.image(index)

    def label(self, index: int) -> int:
        """The class of the image."""
        return int(self.records.labels[index])

    def where(self, index: int) -> str:
        """The path, or the file and row, of the image."""
        return self.records.where(index)

    def sample(self, index: int, epoch: int, copy: int = 0) -> tuple[Tensor, int]:
        """((3, H, W) float32 normalised image, label); `copy` tells the repeats of one image in one epoch apart."""
        with preserved():
            return self.draw(index, epoch, copy)

    def draw(self, index: int, epoch: int, copy: int = 0) -> tuple[Tensor, int]:
        """`sample`, but python, numpy and torch stay reseeded: for drawing many, with their state preserved once."""
        image = self.image(index)
        reseed(Stream.SAMPLE, self.seed, epoch, index, copy)
        return self.transform(image), self.label(index)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.sample(index, 0)


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Raise DataError unless `name` has samples and every label is in 0 ... num_classes - 1."""
    if not len(labels):
        raise DataError(f"{name} is empty: expected at least one image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        row = int(np.argmax((labels < 0) | (labels >= num_classes)))
        hint = "is this a split without labels?" if low < 0 else "give data.num_classes= the right number"
        raise DataError(
            f"{name} has label {int(labels[row])} at row {row}, "
            f"expected 0 ... {num_classes - 1} for {num_classes} classes: {hint}"
        )
