"""WebDataset shards: tar archives in which the members of a sample are adjacent and share their name up to the first
dot: n03445777/12.jpg, n03445777/12.cls, or 12.json.

The archives are never unpacked and a member's name is never used as a path; links and other special members are
skipped. Labels are read as numbers or JSON, nothing is unpickled. Format: https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from recipes.data.errors import DataError
from recipes.data.files import of_split
from recipes.data.folder import SUFFIXES
from recipes.data.shards import Index, Shards, class_names, kept_index

LONGEST_LABEL = 1 << 20  # bytes; a larger .json is not a label
OPEN = 8  # archives that a process keeps open


class Tar(Shards):
    """Images in tar archives, read at the positions in the index."""

    def bytes_of(self, shard: int, offset: int) -> bytes:
        index = int(self.ends[shard] - self.counts[shard]) + offset
        size = int(self.fields["sizes"][index])
        try:
            data = os.pread(self._file(shard), size, int(self.fields["positions"][index]))
        except OSError as error:
            raise DataError(f"cannot read {self.where(index)}: {error}") from error
        if len(data) != size:
            raise DataError(f"{self.where(index)} is truncated: was the archive changed?")
        return data

    def where(self, index: int) -> str:
        ends = self.fields["ends"]
        name = self.fields["names"][ends[index - 1] if index else 0 : ends[index]].tobytes()
        return f"{super().where(index)} ({name.decode(errors='replace')})"

    def _file(self, shard: int) -> int:
        if shard not in self.open:
            self.unchanged(shard)
            if len(self.open) == OPEN:
                os.close(self.open.pop(next(iter(self.open))))
            self.open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self.open[shard]

    def __del__(self) -> None:
        for file in getattr(self, "open", {}).values():
            os.close(file)


def load(cfg, splits: Sequence[str]) -> tuple[list[Tar], list[str]]:
    """Samples of each split, and class names, from the archives under cfg.root.

    Raises DataError for archives that are missing, damaged or compressed, and for samples without image or label.
    """
    if cfg.hub is not None:
        raise DataError(
            f"data={cfg.name} only reads local archives, not data.hub={cfg.hub}: download them and set data.root="
        )
    found = [_split(cfg, cfg[f"{split}_split"]) for split in splits]
    return found, class_names(cfg.root, cfg.num_classes, np.concatenate([part.labels for part in found]))


def _split(cfg, split: str) -> Tar:
    paths = of_split(cfg.root, cfg.name, split, ".tar")
    index = kept_index(paths, f"tar\0{cfg.label_key}", partial(_index, paths, cfg.label_key))
    return Tar(paths, index, cfg.shuffle_buffer, f"{cfg.name}, split {split!r}")


@dataclass
class _Sample:
    key: str
    image: tarfile.TarInfo | None = None
    label: int | None = None


@dataclass
class _Found:
    """The growing columns of the index."""

    counts: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)

    def add(self, sample: _Sample, path: str, label_key: str) -> None:
        if sample.image is None:
            raise DataError(f"{path}: the sample {sample.key} has no image ({', '.join(SUFFIXES)})")
        if sample.label is None:
            raise DataError(f"{path}: the sample {sample.key} has no label: expected .cls, or .json with {label_key!r}")
        self.labels.append(sample.label)
        self.positions.append(sample.image.offset_data)
        self.sizes.append(sample.image.size)
        self.names.append(sample.image.name.encode(errors="surrogateescape"))

    def index(self) -> Index:
        names = np.frombuffer(b"".join(self.names), np.uint8)
        ends = np.cumsum([len(name) for name in self.names], dtype=np.int64)
        columns = {"positions": np.array(self.positions, np.int64), "sizes": np.array(self.sizes, np.int64)}
        labels = np.array(self.labels, np.int64)
        return Index(np.array(self.counts, np.int64), labels, {**columns, "names": names, "ends": ends})


def _index(paths: list[str], label_key: str) -> Index:
    found = _Found()
    for path in paths:
        before = len(found.labels)
        try:
            with tarfile.open(path, "r:") as archive:
                _scan(archive, path, label_key, found)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"cannot read the archive {path}: {error}; expected a whole, uncompressed tar file"
            ) from error
        found.counts.append(len(found.labels) - before)
    return found.index()


def _scan(archive: tarfile.TarFile, path: str, label_key: str, found: _Found) -> None:
    """Add the samples of an archive; folder names are part of the key, and hidden files are ignored."""
    sample = None
    for member in archive:
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if not member.isreg() or member.issparse() or not stem:
            continue
        key = f"{folder}/{stem}"
        if sample is None or key != sample.key:
            if sample is not None:
                found.add(sample, path, label_key)
            sample = _Sample(key)
        _take(archive, member, extension.lower(), sample, label_key)
        archive.members.clear()  # or all of them would be kept
    if sample is not None:
        found.add(sample, path, label_key)
    archive.fileobj.seek(archive.offset)  # where tarfile found no further member: the archive ends or is truncated
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the block that ends an archive is missing: it was truncated")


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: _Sample, label_key: str) -> None:
    if f".{extension}" in SUFFIXES:
        if sample.image is not None:
            raise DataError(
                f"{archive.name}: the sample {sample.key} has two images, {sample.image.name}, {member.name}"
            )
        sample.image = member
    elif extension in ("cls", "json") and sample.label is None:
        sample.label = _label(archive, member, label_key if extension == "json" else None)


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, key: str | None) -> int | None:
    """The number in a .cls member, or the entry `key` of a .json member, None if it has none. Raises DataError."""
    try:
        text = archive.extractfile(member).read(LONGEST_LABEL)
        value = json.loads(text)[key] if key else int(text)
        if type(value) is int:
            return value
    except KeyError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{archive.name}: {member.name} holds no label: {error}") from error
    raise DataError(f"{archive.name}: {member.name} holds {value!r} instead of a class number")
