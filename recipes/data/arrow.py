"""Data sets in Arrow or parquet: from the Hugging Face hub, or from local files with the same columns."""

import io
import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recipes.console import first_line
from recipes.data.encoded import Encoded
from recipes.data.errors import BadImage, DataError
from recipes.data.files import of_split, stamp
from recipes.data.images import File


class Arrow(Encoded):
    """Rows of a memory-mapped Arrow table."""

    def __init__(self, table, image_key: str, labels: np.ndarray, name: str):
        self.table, self.image_key, self.labels, self.name = table, image_key, labels, name
        self.files = "\0".join(stamp(file["filename"]) for file in table.cache_files)

    def encoded(self, index: int) -> File:
        return self.file(index, self.image_key)

    def file(self, index: int, key: str) -> File:
        """The encoded image in a column of a row."""
        cell = self.table[index][key]
        if not cell or not (cell["bytes"] or cell["path"]):
            raise BadImage(f"{self.where(index)} holds no image")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]

    def stamp(self, index: int) -> str:
        return f"{self.files}\0{index}"

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    @cached_property
    def paths(self) -> list[str | None]:
        """The original names of the image files; nothing else is read for this."""
        import pyarrow.compute as pc

        return pc.struct_field(self.table.data.column(self.image_key), "path").to_pylist()

    def name_of(self, index: int) -> str:
        return self.paths[index] or ""


def load(cfg, splits: Sequence[str]) -> tuple[list[Arrow], list[str]]:
    """Rows of each split ("train", "val"), and class names, as described by the `data` group.

    cfg.hub is a name on the hub; with cfg.root only the parquet files under that folder are read, or what `datasets`
    saved there, without the network.
    Raises DataError if there is neither a network nor a local copy, and for a missing split or column.
    """
    chosen = [cfg[f"{split}_split"] for split in splits]
    tables = [table_of(cfg, name) for name in chosen]
    found = [_rows(*table, cfg, name) for table, name in zip(tables, chosen, strict=True)]
    if cfg.root:  # a data set on the hub has a single list of names
        check_agreed(
            itertools.chain(*(_declarations(cfg, name, table) for (_, table), name in zip(tables, chosen, strict=True)))
        )
    return [rows for rows, _ in found], found[0][1]


def _declarations(cfg, split: str, table: Any) -> list[tuple[str, list[str] | None]]:
    """Files of a split and the class names that each declares: `datasets` uses those of the first for all."""
    from pyarrow.parquet import read_schema

    if saved := _saved(cfg, split):
        return [(str(saved), getattr(table.features[cfg.label_key], "names", None))]
    files = of_split(cfg.root, cfg.name, split, ".parquet")
    return [(path, declared(read_schema(path), cfg.label_key)) for path in files]


def declared(schema: Any, key: str) -> list[str] | None:
    """The class names of a column, if the schema of its file has them."""
    import datasets

    names = getattr(datasets.Features.from_arrow_schema(schema)[key], "names", None)
    return list(names) if names else None


def check_agreed(declarations: Iterable[tuple[str, list[str] | None]]) -> None:
    """Raise DataError if two files have different names for the same class number.

    Each file numbers its own classes: one that was made separately, or lacks a class, may do so differently.
    """
    known: dict[int, tuple[str, str]] = {}
    for where, names in declarations:
        for number, name in enumerate(names or ()):
            before, there = known.setdefault(number, (name, where))
            if name != before:
                raise DataError(
                    f"class {number} is {before!r} in {there} and {name!r} in {where}: give the classes the same "
                    "numbers and names in all files, with align_labels_with_mapping of `datasets`"
                )


def package(cfg) -> Any:
    """The package `datasets`. Raises DataError if it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data={cfg.name} needs the package `datasets`: pip install datasets") from error
    return datasets


def table_of(cfg, split: str) -> tuple[Any, Any]:
    """The package `datasets` and its table of a split, from the folder cfg.root or from the hub.

    Raises DataError if either is missing.
    """
    datasets = package(cfg)
    return datasets, _local(datasets, cfg, split) if cfg.root else _from_hub(datasets, cfg, split)


def check_column(table, cfg, option: str, split: str) -> None:
    """Raise DataError unless the table has the column that cfg[option] names."""
    if cfg[option] not in table.column_names:
        raise DataError(
            f"{cfg.name}, split {split!r}, has no column {cfg[option]!r}, only {', '.join(table.column_names)}: "
            f"set data.{option}="
        )


def _from_hub(datasets, cfg, split: str):
    try:
        return datasets.load_dataset(cfg.hub, split=split)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
        raise DataError(f"{cfg.hub} has no split {split!r}: {error}") from error
    # no network, no such name, no permission: every library below it has its own types
    except Exception as error:
        raise DataError(
            f"cannot get {cfg.hub} from the Hugging Face hub: {type(error).__name__}: {first_line(error)}. "
            f"Without a network, set data.root= to a folder with its parquet files (columns {cfg.image_key}, "
            f"{cfg.label_key}; files named after the splits {cfg.train_split}, {cfg.val_split}), "
            "or use data=digits, which needs no download"
        ) from error


def _local(datasets, cfg, split: str):
    saved = _saved(cfg, split)
    chosen = None if saved else of_split(cfg.root, cfg.name, split, ".parquet")
    try:
        if saved:
            return datasets.load_from_disk(str(saved))
        return datasets.load_dataset("parquet", data_files={split: chosen}, split=split)
    # Arrow and datasets raise their own types for a broken file
    except Exception as error:
        kind = "saved" if saved else "parquet"
        raise DataError(f"cannot read the {kind} files of {split!r} under {cfg.root}: {first_line(error)}") from error


def _saved(cfg, split: str) -> Path | None:
    """The folder that `datasets` wrote for a split with save_to_disk, if there is one under cfg.root."""
    folder = Path(cfg.root).expanduser() / split
    return folder if (folder / "state.json").is_file() else None


def _rows(datasets, table, cfg, split: str) -> tuple[Arrow, list[str]]:
    for option in ("image_key", "label_key"):
        check_column(table, cfg, option, split)
    column = table.select_columns(cfg.label_key).with_format("arrow")[:][cfg.label_key].to_numpy()
    labels = numbers(column, f"{cfg.name}, split {split!r}", cfg.label_key)
    feature = table.features[cfg.label_key]
    count = cfg.num_classes or int(labels.max(initial=-1)) + 1
    names = getattr(feature, "names", None) or [str(label) for label in range(count)]
    images = table.select_columns(cfg.image_key).cast_column(cfg.image_key, datasets.Image(decode=False))
    return Arrow(images, cfg.image_key, labels, f"{cfg.name}, split {split!r}"), list(names)


def numbers(column: Any, where: str, key: str) -> np.ndarray:
    """Labels, (N,) int64. Raises DataError for a column of anything but whole numbers, one per row."""
    row, cell = next(((row, cell) for row, cell in enumerate(column) if cell is not None), (0, 0))
    if np.ndim(cell):
        raise DataError(
            f"{where}: the column {key!r} holds several labels, {np.asarray(cell).tolist()} at row {row}: expected one "
            "per image, the number of a class; set data.label_key= to another column"
        )
    found = np.asarray(column)
    whole = found.dtype.kind in "iub" or (found.dtype.kind == "f" and (found == np.floor(found)).all())
    if len(found) and not whole:
        row, value = next((row, value) for row, value in enumerate(found.tolist()) if not _is_whole(value))
        value = value.item() if isinstance(value, np.generic) else value
        value = None if value != value else value  # missing values in a column of numbers are NaN
        raise DataError(
            f"{where}: the column {key!r} holds {value!r} at row {row}, expected the number of a class: set "
            "data.label_key= to another column, or number the classes with class_encode_column of `datasets`"
        )
    return found.astype(np.int64)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and value == value // 1
