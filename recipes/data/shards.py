"""Data sets in shards, tar archives or parquet files, that are read sequentially.

An index of every shard, made once and cached, has the number of its samples, their labels and positions: so a reader
can start anywhere without reading what comes before. `recipes.data.stream_order` defines the order of reading.
"""

from __future__ import annotations

import io
import os
import zipfile
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.console import note
from recipes.data.encoded import Encoded
from recipes.data.errors import DataError
from recipes.data.files import replace_file, same_content, sidecar, stamp
from recipes.data.images import File
from recipes.names import at_home
from zoo.files import is_file

MANY = 1000  # classes are counted up to this number, however few images there are


@dataclass(frozen=True)
class Index:
    """The contents of the shards of one split.

    counts  (S,) samples of each shard
    labels  (N,) class of each sample
    fields  arrays specific to the format
    """

    counts: np.ndarray
    labels: np.ndarray
    fields: dict[str, np.ndarray]


class Shards(Encoded):
    """The samples of one split, numbered consecutively over its shards, which are sorted by name.

    A worker reads ahead the samples that a batch lists (`read`) and drops those that it lists as done (`forget`); other
    samples are read on their own, so that any sample is accessible at any time.
    """

    def __init__(self, paths: list[str], index: Index, buffer: int, name: str):
        if buffer < 1:
            raise DataError(f"data.shuffle_buffer={buffer}: expected at least 1, which keeps the order of each shard")
        self.paths, self.buffer, self.name = paths, buffer, name
        self.names = [Path(path).name for path in paths]
        self.labels, self.counts, self.fields = index.labels, index.counts, index.fields
        self.ends = np.cumsum(index.counts)
        self.stamps = list(map(stamp, paths))
        self.held: dict[int, bytes] = {}
        self.open: dict[int, Any] = {}  # shard -> what reads it, in the process that opened it
        self.process = os.getpid()

    @abstractmethod
    def bytes_of(self, shard: int, offset: int) -> bytes:
        """The encoded image of a sample; fast if it follows the last one that was read. Raises DataError."""

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard, and the number of the sample within it."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, int(index - self.ends[shard] + self.counts[shard])

    def where(self, index: int) -> str:
        shard, offset = self.locate(index)
        return f"{self.paths[shard]}, sample {offset}"

    def stamp(self, index: int) -> str:
        shard, offset = self.locate(index)
        return f"{self.stamps[shard]}\0{offset}"

    def encoded(self, index: int) -> File:
        return io.BytesIO(self.held[index] if index in self.held else self._bytes(index))

    def read(self, indices: Iterable[int], *, opens: bool) -> None:
        """Keep the bytes of these samples; `opens` drops those kept before."""
        if opens:
            self.held.clear()
        for index in indices:
            self.held[index] = self._bytes(index)

    def forget(self, indices: Iterable[int]) -> None:
        """Drop these samples."""
        for index in indices:
            self.held.pop(index, None)

    def _bytes(self, index: int) -> bytes:
        if self.process != os.getpid():  # a forked worker opens its own files
            self.open, self.process = {}, os.getpid()
        return self.bytes_of(*self.locate(index))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": {}, "held": {}}

    def unchanged(self, shard: int) -> None:
        """Raise DataError if a shard has changed since it was indexed."""
        path = self.paths[shard]
        if not same_content(stamp(path), self.stamps[shard]):
            raise DataError(f"{path} was changed while it was in use: start again, and leave it unchanged")


def kept_index(paths: list[str], what: str, make) -> Index:
    """`make()`, or its cached result for the same shards; `what` names everything else that it depends on."""
    stamps = "\0\0".join([what, *map(stamp, paths)])
    file = sidecar("shards", "\0".join([what, *paths]), ".npz")
    if found := _cached(file, stamps):
        return found
    index = make()
    buffer = io.BytesIO()
    np.savez(buffer, stamps=np.array(stamps), counts=index.counts, labels=index.labels, **index.fields)
    replace_file(file, buffer.getvalue(), f"the index of {len(paths)} shards")
    return index


def _cached(file: Path | None, stamps: str) -> Index | None:
    """The index in a file, if it is of shards with these stamps."""
    if file is None:
        return None
    try:
        with np.load(file, allow_pickle=False) as found:
            if str(found["stamps"]) != stamps:
                return None
            rest = {key: found[key] for key in found.files if key not in ("stamps", "counts", "labels")}
            return Index(found["counts"], found["labels"], rest)
    except FileNotFoundError:
        return None  # never indexed
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        note(f"the cached index {file} cannot be read ({error}): reading the shards again")
        return None


def class_names(root: str | None, count: int | None, labels: np.ndarray) -> list[str]:
    """The lines of classes.txt in the folder, with numbers for more classes up to `count`; without it, all numbers.

    Raises DataError for a file that is not one name per line, and for what `counted` refuses; OSError for a folder that
    may not be entered.
    """
    path = Path(at_home(root), "classes.txt") if root else None
    if path is None or not is_file(path):
        return counted(count, labels)
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected the name of a class on each line, in UTF-8") from error
    lines: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name or name in lines:
            said = f"the name {name!r} in line {lines[name]} too" if name else "no name"
            raise DataError(
                f"{path}, line {line}, has {said}: expected one name per line, each its own, in their order"
            )
        lines[name] = line
    if count is not None and count < len(names):
        raise DataError(
            f"{path} has the names of {len(names)} classes, expected {count} (data.num_classes=, or the run's) at most"
        )
    return names + [str(label) for label in range(len(names), count or 0)]


def counted(count: int | None, labels: np.ndarray) -> list[str]:
    """The numbers of `count` classes; if it is None, of as many as the labels need.

    Raises DataError if these are far more than there are labels: then they are hardly classes.
    """
    needed = int(labels.max(initial=-1)) + 1
    if count is None and needed > max(MANY, 10 * len(labels)):
        raise DataError(
            f"the largest of {len(labels)} labels is {needed - 1}, which would make {needed} classes: expected labels "
            "from 0 on. Is it another column (data.label_key=)? If not, set data.num_classes= to their number"
        )
    return [str(label) for label in range(needed if count is None else count)]
