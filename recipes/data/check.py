"""Reads every image of a data set, and lists those that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from recipes.console import say, tracked
from recipes.data.build import Data
from recipes.data.errors import DataError
from recipes.data.images import orientation
from recipes.data.loader import batches
from recipes.data.source import Source
from zoo.errors import printable

BATCH = 16  # images that a worker reads at a time


class Found(NamedTuple):
    """What reading an image gave.

    turned  its EXIF orientation, 1 if it is upright or was rotated
    why     the reason if the image or its label cannot be used, else None
    """

    index: int
    turned: int
    why: str | None


class Checked(Source):
    """What reading each image of a source gives, without its transform; an error is a result.

    A source, so that `batches` reads it in worker processes as it does in training.
    """

    def __init__(self, source: Source):
        super().__init__(source, None, name=source.name, seed=source.seed)

    def __len__(self) -> int:
        return len(self.records)

    def draw(self, index: int, epoch: int, copy: int = 0, *, finish: bool = True) -> Found:
        try:
            image, _ = self.records.read(index)
        except DataError as error:
            return Found(index, 1, str(error))
        return Found(index, orientation(image), None)

    def collate(self, samples: list[Found]) -> tuple[list[Found], None]:
        return samples, None

    def finish(self, images: Any) -> Any:
        return images


def check(data: Data, workers: int | None) -> int:
    """Print every image of both splits that cannot be used, and the counts; returns the number of such images.

    The counts come last, also if Ctrl-C ends it early.
    """
    seen = bad = turned = 0
    try:
        for source in (data.train, data.val):
            first, before = None, turned
            for found in _watched(source, workers):
                seen += 1
                if found.why is not None:
                    bad += 1
                    say(found.why, "red")
                elif found.turned != 1:
                    turned += 1
                    first = first or found
            if first is not None:
                where = printable(source.where(first.index))
                say(
                    f"{turned - before} of {len(source)} images in {source.name} have an EXIF orientation that is not "
                    f"applied, the first is {where} ({first.turned}): {source.tag_advice}",
                    "yellow",
                )
    finally:
        total = len(data.train) + len(data.val)
        tagged = f"{turned} have an EXIF orientation that is not applied"
        say(f"{seen} of {total} images read: {bad} cannot be used, {tagged}")
    return bad


def _watched(source: Source, workers: int | None) -> Iterator[Found]:
    checked = Checked(source)
    stream = batches(checked, batch_size=BATCH, seed=source.seed, epoch=0, train=False, workers=workers)
    yield from tracked((found for samples, _ in stream for found in samples), len(source), source.name)
    checked.end_workers()
