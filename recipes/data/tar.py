"""WebDataset shards: tar archives in which the members of a sample are adjacent and share their name up to the first
dot: n03445777/12.jpg, n03445777/12.cls, or 12.json.

The archives are never unpacked and a member's name is never used as a path; links are left out, with a note, as are
other special members. Labels are read as numbers or JSON, nothing is unpickled. Format: https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import json
import os
import reprlib
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from recipes.data.errors import DataError
from recipes.data.files import files_of, note_once
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
            file, written = self._file(shard)
            data, now = os.pread(file, size, int(self.fields["positions"][index])), os.fstat(file).st_mtime_ns
        except OSError as error:
            raise DataError(f"cannot read {self.where(index)}: {error}") from error
        if len(data) != size:
            raise DataError(f"{self.where(index)} is truncated: was the archive changed?")
        if now != written:
            raise DataError(f"{self.paths[shard]} was overwritten while it was in use: start again")
        return data

    def where(self, index: int) -> str:
        ends = self.fields["ends"]
        name = self.fields["names"][ends[index - 1] if index else 0 : ends[index]].tobytes()
        return f"{super().where(index)} ({name.decode(errors='replace')})"

    def _file(self, shard: int) -> tuple[int, int]:
        """An open archive, and when it had been written."""
        if shard not in self.open:
            self.unchanged(shard)
            if len(self.open) == OPEN:
                os.close(self.open.pop(next(iter(self.open)))[0])
            file = os.open(self.paths[shard], os.O_RDONLY)
            self.open[shard] = file, os.fstat(file).st_mtime_ns
        return self.open[shard]

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone
        for file, _ in getattr(self, "open", {}).values():
            close(file)


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
    paths, name = files_of(cfg, split, ".tar"), f"{cfg.name}, split {split!r}"
    index = kept_index(paths, f"tar\0{cfg.label_key}", partial(_index, paths, cfg.label_key))
    if said := str(index.fields["left_out"]):
        note_once(f"{name}: {said}")
    return Tar(paths, index, cfg.shuffle_buffer, name)


@dataclass
class _Sample:
    """The members of a sample that were met so far; `label` is the .cls, or the .json until there is one."""

    key: str
    image: tarfile.TarInfo | None = None
    label: tarfile.TarInfo | None = None


@dataclass
class _Found:
    """The growing columns of the index; `link` is the first of the links."""

    counts: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    links: int = 0
    link: str = ""

    def add(self, archive: tarfile.TarFile, sample: _Sample, label_key: str) -> None:
        label = _label(archive, sample.label, label_key) if sample.label else None
        if sample.image is None or label is None:
            lacks = f"label: expected .cls, or .json with {label_key!r}"
            lacks = f"image ({', '.join(SUFFIXES)})" if sample.image is None else lacks
            raise DataError(f"{archive.name}: the sample {sample.key} has no {lacks}. {self.left_out()}".rstrip(". "))
        self.labels.append(label)
        self.positions.append(sample.image.offset_data)
        self.sizes.append(sample.image.size)
        self.names.append(sample.image.name.encode(errors="surrogateescape"))

    def left_out(self) -> str:
        """A note on the links that were met, if any."""
        if not self.links:
            return ""
        return (
            f"{self.links} links are left out, such as {self.link}: pack with tar --dereference --hard-dereference to "
            "have the files in their place"
        )

    def index(self) -> Index:
        names = np.frombuffer(b"".join(self.names), np.uint8)
        ends = np.cumsum([len(name) for name in self.names], dtype=np.int64)
        columns = {"positions": np.array(self.positions, np.int64), "sizes": np.array(self.sizes, np.int64)}
        columns |= {"names": names, "ends": ends, "left_out": np.array(self.left_out())}
        return Index(np.array(self.counts, np.int64), np.array(self.labels, np.int64), columns)


def _index(paths: list[str], label_key: str) -> Index:
    found = _Found()
    for path in paths:
        before = len(found.labels)
        try:
            with tarfile.open(path, "r:") as archive:
                _scan(archive, label_key, found)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"cannot read the archive {path}: {error}; expected a whole, uncompressed tar file"
            ) from error
        found.counts.append(len(found.labels) - before)
    return found.index()


def _scan(archive: tarfile.TarFile, label_key: str, found: _Found) -> None:
    """Add the samples of an archive; folder names are part of the key, and hidden files are ignored."""
    sample = None
    for member in archive:
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if (member.islnk() or member.issym()) and _is_part(extension):
            found.links += 1
            found.link = found.link or f"{archive.name}, {member.name}"
        if not member.isreg() or member.issparse() or not stem:
            continue
        key = f"{folder}{slash}{stem}"
        if sample is None or key != sample.key:
            if sample is not None:
                found.add(archive, sample, label_key)
            sample = _Sample(key)
        _take(archive, member, extension.lower(), sample)
        archive.members.clear()  # or all of them would be kept
    _check_end(archive)  # before the last sample, which may be without the members that were cut off
    if sample is not None:
        found.add(archive, sample, label_key)


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless the archive ends where tarfile found no further member, and the file with it."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the block that ends an archive is missing: it was truncated")
    while padding := archive.fileobj.read(1 << 20):
        if padding.strip(b"\0"):
            raise tarfile.ReadError(
                "there is more behind the block that ends an archive, such as a second archive: join archives with "
                "tar --concatenate"
            )


def _is_part(extension: str) -> bool:
    return f".{extension.lower()}" in (*SUFFIXES, ".cls", ".json")


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: _Sample) -> None:
    if f".{extension}" in SUFFIXES:
        if sample.image is not None:
            raise DataError(
                f"{archive.name}: the sample {sample.key} has two images, {sample.image.name}, {member.name}"
            )
        sample.image = member
    elif extension == "cls" or (extension == "json" and sample.label is None):
        sample.label = member


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> int | None:
    """The number in a .cls member, or the entry `key` of a .json member, None if it has none. Raises DataError."""
    text = archive.extractfile(member).read(LONGEST_LABEL)
    expected = "expected the number of a class, such as 7; the names of classes go into classes.txt"
    try:
        value = json.loads(text)[key] if member.name.lower().endswith("json") else int(text)
        if type(value) is int and abs(value) < 1 << 63:
            return value
    except KeyError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{archive.name}: {member.name} holds no label: {reprlib.repr(text)} ({error}); {expected}"
        ) from error
    raise DataError(f"{archive.name}: {member.name} holds {reprlib.repr(value)} instead of a class number: {expected}")
