"""One split of a data set: records, a transform, and the seeding that makes a sample reproducible."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision import transforms as tv

from recipes.console import note
from recipes.data.cache import Cache
from recipes.data.encoded import Encoded
from recipes.data.errors import BadImage, DataError
from recipes.data.images import AS_SHOWN, Jpeg, not_applied, orientation
from recipes.data.seeding import Stream, preserved, reseed, seed_of
from recipes.data.transforms import Normalize
from zoo.errors import printable

OTHERS = 64  # images that are tried as a replacement for one that cannot be decoded


class Records(Protocol):
    """The images of a data set: the interface it must offer. Records with encoded images are `Encoded`."""

    labels: np.ndarray  # (N,) int64

    def image(self, index: int) -> Image.Image:
        """The image as 8-bit RGB; raises DataError naming it if it cannot be read."""

    def where(self, index: int) -> str:
        """The name of the record in error messages: a path, or a file and a row."""


class Replaced(NamedTuple):
    """A sample that could not be decoded, the one that replaces it, and why."""

    index: int
    by: int
    why: str


class Source(Dataset):
    """A map-style split, read by index.

    `sample(index, epoch)` depends on (seed, epoch, index) alone, not on the process or what was read before.

    replace  whether an image that cannot be decoded is replaced by another: the first decodable one that (seed, epoch,
             index) draws, with its own label, augmented like the one it replaces. Files that cannot be read at all,
             such as missing ones, are an error nevertheless.
    late     whether the transform takes an undecoded Jpeg
    cache    cache of decoded images
    """

    tag_advice = AS_SHOWN  # on an image whose EXIF orientation is not applied

    def __init__(
        self,
        records: Records,
        transform: Callable[[Image.Image], Tensor],
        *,
        name: str,
        seed: int,
        replace: bool = False,
        late: bool = False,
        cache: Cache | None = None,
    ):
        self.records, self.transform = records, transform
        self.name, self.seed = name, seed
        *steps, last = getattr(transform, "transforms", None) or [None]
        self.normalize = last if isinstance(last, Normalize) else None  # if it comes last, it can be done later
        self.steps = tv.Compose(steps)
        self.replace, self.late, self.cache = replace, late and isinstance(records, Encoded), cache
        self.news: list[Replaced] = []
        self.bad = 0  # replaced samples in the batches that came out of the loader
        self.named: set[int] = set()
        self.turned = False  # whether an image whose EXIF orientation is not applied was met
        self.idle: dict[int, DataLoader] = {}  # number of workers -> a loader whose workers wait for the next epoch

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"idle": {}}  # a worker's copy starts no workers of its own

    def __len__(self) -> int:
        return len(self.records.labels)

    def image(self, index: int) -> Image.Image:
        """The image before the transform, RGB; raises DataError if it cannot be read, BadImage if not decoded."""
        return self.records.image(index) if self.cache is None else self.cache.image(self.records, index)

    def label(self, index: int) -> int:
        """The class of the image."""
        return int(self.records.labels[index])

    def read(self, index: int) -> tuple[Image.Image, Any]:
        """The image and its label before the transform; raises BadImage if one of them cannot be used."""
        return self.image(index), self.label(index)

    def where(self, index: int) -> str:
        """The path, or the file and row, of the image."""
        return self.records.where(index)

    def sample(self, index: int, epoch: int, copy: int = 0) -> tuple[Tensor, int]:
        """((3, H, W) float32 normalised image, label); `copy` distinguishes repeats of an image within an epoch."""
        with preserved():
            return self.draw(index, epoch, copy)

    def draw(self, index: int, epoch: int, copy: int = 0, *, finish: bool = True) -> tuple[Tensor, int]:
        """`sample`, but python, numpy and torch stay reseeded: for drawing many, with their state preserved once.

        Without `finish` the image is uint8 and still has to be passed to `normalize.finish`.
        """
        why = None
        for chosen in itertools.chain([index], self._others(index, epoch)):
            try:
                drawn = self._drawn(chosen, (epoch, index, copy), finish)
            except BadImage as error:
                if not self.replace:
                    raise type(error)(f"{error}. {error.advice}") from error
                why = why or str(error)
                continue
            if why:
                self.news.append(Replaced(index, chosen, why))
            return drawn
        raise DataError(f"{why}; none of the {OTHERS} images drawn to replace it could be decoded either")

    def _others(self, index: int, epoch: int) -> Iterator[int]:
        for attempt in range(OTHERS if self.replace else 0):
            yield seed_of(Stream.REPLACE, self.seed, epoch, index, attempt) % len(self)

    def _drawn(self, index: int, draws: tuple[int, int, int], finish: bool) -> tuple[Tensor, Any]:
        """Image and label of a record; `draws` (epoch, index, copy) seed what the transform draws."""
        image: Image.Image | Jpeg = self.records.late(index) if self.late else self.image(index)
        self._look_at_tag(image, index)
        reseed(Stream.SAMPLE, self.seed, *draws)
        return self.transform(image) if finish else self.normalize.planes(self.steps(image)), self.label(index)

    def _look_at_tag(self, image: Image.Image | Jpeg, index: int) -> None:
        """Note the first image whose EXIF orientation is not applied, once: in the first worker of the first rank."""
        worker = get_worker_info()
        first = (worker is None or worker.id == 0) and os.environ.get("RANK", "0") == "0"
        if first and not self.turned and (turned := orientation(image)) != 1:
            self.turned = True
            note(not_applied(turned, f"{self.where(index)} in {self.name}", self.tag_advice))

    def collate(self, samples: list[tuple[Tensor, Any]]) -> Any:
        """Samples as a batch."""
        return default_collate(samples)

    def finish(self, images: Any) -> Any:
        """Images of a batch as the model takes them, if `draw` has not finished them."""
        return self.normalize.finish(images) if images.dtype == torch.uint8 else images

    def take_news(self) -> list[Replaced]:
        """The samples that `draw` has replaced since the last call."""
        news, self.news = self.news, []
        return news

    def note(self, news: list[Replaced]) -> None:
        """Count replaced samples; name each on standard error the first time."""
        self.bad += len(news)
        for index, by, why in news:
            if index not in self.named:
                self.named.add(index)
                note(printable(f"bad image in {self.name}, replaced by {self.where(by)}: {why}"))

    def take_bad(self) -> int:
        """How many samples were replaced in the batches since the last call."""
        bad, self.bad = self.bad, 0
        return bad

    def end_workers(self) -> None:
        """End the worker processes that wait for the next epoch."""
        self.idle.clear()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.sample(index, 0)


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Raise DataError unless `name` has samples and every label is in 0 ... num_classes - 1."""
    if not len(labels):
        raise DataError(f"{name} is empty: expected at least one image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        row = int(np.argmax((labels < 0) | (labels >= num_classes)))
        expected = f"0 ... {num_classes - 1} for {num_classes} classes" if num_classes else "numbers from 0 on"
        more = (
            "set data.num_classes= to the right number, or name all classes in the column's ClassLabel, if it is one, "
            "or in the classes.txt of shards"
        )
        hint = "is this a split without labels?" if low < 0 else more
        raise DataError(f"{name} has label {int(labels[row])} at row {row}, expected {expected}: {hint}")
