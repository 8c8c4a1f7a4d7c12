"""Parquet files, local or streamed from the Hugging Face hub, read sequentially and never copied whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from recipes.data.arrow import NAMES, ROWS, check_agreed, check_images, declared, named, numbers, package
from recipes.data.errors import DataError
from recipes.data.files import files_of, is_local
from recipes.data.shards import Index, Shards, class_names, kept_index
from zoo.errors import first_line


class Parquet(Shards):
    """Rows of parquet files; row groups before the requested one are never read."""

    def __init__(self, *args, image_key: str):
        super().__init__(*args)
        self.image_key = image_key

    def stamp(self, index: int) -> str:
        return f"{super().stamp(index)}\0{self.image_key}"

    def bytes_of(self, shard: int, offset: int) -> bytes:
        if shard not in self.open:
            self.unchanged(shard)
            self.open = {shard: _Rows(self.paths[shard], self.image_key)}  # readers never return to an earlier shard
        try:
            cell = self.open[shard].cell(offset)
        # Arrow, and the libraries for URLs, raise their own types
        except Exception as error:
            raise DataError(f"cannot read {self.paths[shard]}, row {offset}: {first_line(error)}") from error
        path = cell if isinstance(cell, str) else None
        if isinstance(cell, dict):
            cell, path = cell.get("bytes"), cell.get("path")
        if path is not None and not isinstance(cell, bytes):
            raise DataError(
                f"{self.paths[shard]}, row {offset}, holds the name of an image, {NAMES.repr(path)}, but not its "
                "bytes: read the files in place with data.source=arrow, or store their bytes in it"
            )
        return cell or b""  # null counts as an empty image


class _Rows:
    """A parquet file with a read position."""

    def __init__(self, path: str, key: str):
        self.file, self.key = opened(path), key
        groups = self.file.metadata
        self.ends = np.cumsum([groups.row_group(group).num_rows for group in range(groups.num_row_groups)])
        self.first, self.cells, self.group = 0, [], -1
        self.rest: Iterator[Any] = iter(())

    def cell(self, row: int) -> Any:
        group = int(np.searchsorted(self.ends, row, side="right"))
        if group != self.group or row < self.first:
            self.cells = []
            self.first = int(self.ends[group - 1]) if group else 0
            self.rest = self.file.iter_batches(ROWS, row_groups=[group], columns=[self.key], use_threads=False)
        self.group = -1  # an error ends `rest`: the next row then starts at its group again
        while row >= self.first + len(self.cells):
            cells = next(self.rest).column(0)
            self.first, self.cells = self.first + len(self.cells), cells
        self.group = group
        return self.cells[row - self.first].as_py()


def opened(path: str):
    """A pyarrow ParquetFile of a path or a URL."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path if is_local(path) else fsspec.open(path, "rb").open(), pre_buffer=False)


def load(cfg, splits: Sequence[str]) -> tuple[list[Parquet], list[str]]:
    """Rows of each split, and class names; cfg.hub names a data set of the hub, cfg.root a folder.

    Raises DataError for missing files and columns.
    """
    datasets = package(cfg)
    found = [_split(datasets, cfg, cfg[f"{split}_split"]) for split in splits]
    # of remote files only the first of each split is checked, as each costs a request
    files = [path for part in found for path in part.paths if is_local(path) or path == part.paths[0]]
    names = {path: declared(_checked(path, cfg).schema_arrow, cfg.label_key, path) for path in files}
    check_agreed(names.items())
    if declares := names[files[0]]:
        return found, named(declares, cfg)
    return found, class_names(cfg.root, cfg.num_classes, np.concatenate([part.labels for part in found]))


def _split(datasets, cfg, split: str) -> Parquet:
    hub = cfg.hub is not None and cfg.root is None
    paths = _of_hub(datasets, cfg, split) if hub else files_of(cfg, split, ".parquet")
    index = kept_index(paths, f"parquet\0{cfg.label_key}", partial(_index, paths, cfg))
    return Parquet(paths, index, cfg.shuffle_buffer, f"{cfg.name}, split {split!r}", image_key=cfg.image_key)


def _of_hub(datasets, cfg, split: str) -> list[str]:
    try:
        found = datasets.load_dataset_builder(cfg.hub).config.data_files or {}
    # no network, no such name, no permission: every library below it has its own types
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"cannot get {cfg.hub} from the Hugging Face hub: {said}; or set data.root=") from error
    files = {str(key): sorted(map(str, paths)) for key, paths in found.items()}
    paths = files.get(split, [])
    if not paths or not all(path.endswith(".parquet") for path in paths):
        raise DataError(
            f"{cfg.hub} has no parquet files of the split {split!r}, only {', '.join(files) or 'no files'}: "
            "set data.train_split= and data.val_split=, or download all of it with data.source=arrow"
        )
    return paths


def _index(paths: list[str], cfg) -> Index:
    labels = [_labels(path, cfg) for path in paths]
    return Index(np.array([len(part) for part in labels], np.int64), np.concatenate(labels), {})


def _labels(path: str, cfg) -> np.ndarray:
    file = _checked(path, cfg)
    with _named(path):
        column = file.read([cfg.label_key]).column(0).to_numpy()
    return numbers(column, path, cfg.label_key)


def _checked(path: str, cfg) -> Any:
    """A pyarrow ParquetFile; raises DataError unless it can be read and has images and labels in the columns of cfg."""
    with _named(path):
        file = opened(path)
    columns = file.schema_arrow.names
    for option in ("image_key", "label_key"):
        if cfg[option] not in columns:
            raise DataError(f"{path} has no column {cfg[option]!r}, only {', '.join(columns)}: set data.{option}=")
    check_images(file.schema_arrow, cfg, "image_key", path)
    return file


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the file in errors of Arrow, and of the libraries for URLs, which raise their own types."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot read the parquet file {path}: {first_line(error)}") from error
