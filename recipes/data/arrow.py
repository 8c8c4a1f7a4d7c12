"""Data sets in Arrow or parquet: from the Hugging Face hub, or from local files with the same columns."""

import errno
import io
import itertools
import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.encoded import Encoded
from recipes.data.errors import BadImage, DataError
from recipes.data.files import files_of, note_once, root_of, stamp
from recipes.data.images import File
from recipes.data.shards import counted
from zoo.errors import first_line
from zoo.files import is_file

ROWS = 32  # of a parquet file, decoded at a time
ENCODED = ("binary", "large_binary", "binary_view", "string", "large_string", "string_view", "null")
LARGE = {"large_binary": "binary", "large_string": "string"}
NAMES = reprlib.Repr()  # a column of texts may hold whole images in base64
NAMES.maxstring = 200


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
        if cell["bytes"]:
            return io.BytesIO(cell["bytes"])
        if not os.path.isfile(cell["path"]):
            raise DataError(
                f"{self.where(index)} holds the name of an image, {NAMES.repr(cell['path'])}, but there is no such "
                "file: expected one on this machine, or the bytes of an encoded image"
            )
        return cell["path"]

    def stamp(self, index: int) -> str:
        place = self.in_place[index]
        return "\0".join([self.files, self.image_key, str(index), *([stamp(place)] if place else [])])

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    @cached_property
    def in_place(self) -> list[str | None]:
        """The names of the image files that are read where they are, as the table has no bytes of them."""
        import pyarrow.compute as pc

        content = pc.struct_field(self.table.data.column(self.image_key), "bytes")
        if not content.null_count:
            return [None] * len(self)
        lacking = pc.is_null(content).to_pylist()
        return [path if lacks else None for path, lacks in zip(self.paths, lacking, strict=True)]

    @cached_property
    def paths(self) -> list[str | None]:
        """The original names of the image files; nothing else is read for this."""
        import pyarrow.compute as pc

        return pc.struct_field(self.table.data.column(self.image_key), "path").to_pylist()

    def path_of(self, index: int) -> str:
        return self.paths[index] or ""


def load(cfg, splits: Sequence[str]) -> tuple[list[Arrow], list[str]]:
    """Rows of each split ("train", "val"), and class names, as described by the `data` group.

    cfg.hub is a name on the hub; with cfg.root only the parquet files under that folder are read, or what `datasets`
    saved there, without the network.
    Raises DataError if there is neither a network nor a local copy, and for a missing split or column.
    """
    chosen = [cfg[f"{split}_split"] for split in splits]
    datasets = package(cfg)
    tables, files = zip(*(table_of(datasets, cfg, name) for name in chosen), strict=True)
    found = [_rows(datasets, table, cfg, name) for table, name in zip(tables, chosen, strict=True)]
    if cfg.root:  # a data set on the hub has a single list of names
        check_agreed(itertools.chain(*map(partial(_declarations, cfg), chosen, tables, files)))
    if names := getattr(tables[0].features[cfg.label_key], "names", None):
        return found, named(list(names), cfg)
    return found, counted(cfg.num_classes, np.concatenate([part.labels for part in found]))


def named(names: list[str], cfg) -> list[str]:
    """The class names that a column declares; says so if data.num_classes is another number."""
    if cfg.num_classes not in (None, len(names)):
        note_once(
            f"data.num_classes={cfg.num_classes} is not used: column {cfg.label_key!r} declares {len(names)} classes"
        )
    return names


def _declarations(cfg, split: str, table: Any, files: Sequence[str]) -> list[tuple[str, list[str] | None]]:
    """Files of a split and the class names that each declares: `datasets` uses those of the first for all."""
    from pyarrow.parquet import read_schema

    if not files:
        return [(str(_saved(cfg, split)), getattr(table.features[cfg.label_key], "names", None))]
    return [(path, declared(read_schema(path), cfg.label_key, path)) for path in files]


def declared(schema: Any, key: str, path: str) -> list[str] | None:
    """The class names of a column, if the schema of its file has them.

    path  of the file; raises DataError naming it if `datasets` cannot read the schema
    """
    import datasets

    try:
        found = datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # metadata that are not as expected can make it raise anything
        raise DataError(f"cannot read the columns of the parquet file {path}: {first_line(error)}") from error
    names = getattr(found[key], "names", None)
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


def table_of(datasets, cfg, split: str) -> tuple[Any, list[str]]:
    """The table of a split, from the folder cfg.root or from the hub, and the parquet files that it was read from:
    none on the hub, or where `datasets` saved it.

    Raises DataError if the split is missing.
    """
    return _local(datasets, cfg, split) if cfg.root else (_from_hub(datasets, cfg, split), [])


def check_column(table, cfg, option: str, split: str) -> None:
    """Raise DataError unless the table has the column that cfg[option] names."""
    if cfg[option] not in table.column_names:
        raise DataError(
            f"{cfg.name}, split {split!r}, has no column {cfg[option]!r}, only {', '.join(table.column_names)}: "
            f"set data.{option}="
        )


def _from_hub(datasets, cfg, split: str):
    if cfg.hub is None:
        raise DataError(
            f"data={cfg.name} needs data.root=<folder with *.parquet files named after their splits, or one that "
            "`datasets` wrote with save_to_disk>, or data.hub=<name on the Hugging Face hub>"
        )
    _check_cache(datasets)
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


def _local(datasets, cfg, split: str) -> tuple[Any, list[str]]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_metadata

    saved = _saved(cfg, split)
    chosen = [] if saved else _files(cfg, split)
    if not saved:
        _check_cache(datasets)
    try:  # a file without rows is an error of `datasets`
        if saved:
            filled = json.loads((saved / "state.json").read_text("utf-8"))["_data_files"]
            table = datasets.load_from_disk(str(saved)).with_format(None) if filled else None
        else:
            filled = [path for path in chosen if read_metadata(path).num_rows]
            table = datasets.load_dataset("parquet", data_files={split: filled}, split=split) if filled else None
    # Arrow and datasets raise their own types for a broken file
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` says that an error occurred
        if chosen and (unwritten := _of_cache(error, cache := Path(datasets.config.HF_DATASETS_CACHE))):
            raise DataError(
                f"`datasets` cannot keep the tables that it makes of the parquet files of {split!r} in {cache}: "
                f"{unwritten}. Set HF_HOME to a folder that can be written and has room"
            ) from error
        if isinstance(cause, (ArrowInvalid, OSError)) and getattr(cause, "errno", None) is None:  # not a full disk
            for path in chosen:
                _check_readable(path)
        kind, said = "saved" if saved else "parquet", " ".join(str(cause).split())
        raise DataError(f"cannot read the {kind} files of {split!r} under {cfg.root}: {said}") from error
    if table is None or len(table) == 0:
        raise DataError(f"{cfg.name}, split {split!r}, under {cfg.root} has no rows: expected at least one image")
    return table, chosen


def _check_cache(datasets) -> None:
    """Raise DataError if there is no folder for the tables that `datasets` makes: one called ~ would be made."""
    if str(datasets.config.HF_DATASETS_CACHE).startswith("~"):
        raise DataError(
            "`datasets` keeps the tables that it makes of parquet files below the home folder, and this user has none: "
            "set HF_HOME to a folder that can be written"
        )


def _of_cache(error: BaseException | None, cache: Path) -> OSError | None:
    """The error of writing there that an error came of; None for one of reading the files of a data set."""
    while error is not None:
        if isinstance(error, OSError):
            named = Path(error.filename if isinstance(error.filename, str) else "")
            within = named.parts and (named.is_relative_to(cache) or cache.is_relative_to(named))
            if within or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                return error
        error = error.__cause__ or error.__context__
    return None


def _check_readable(path: str) -> None:
    """Raise DataError if a parquet file is broken: `datasets` does not say which one is."""
    from pyarrow.parquet import ParquetFile

    try:
        for _ in ParquetFile(path).iter_batches(ROWS):
            pass
    except Exception as error:
        raise DataError(f"cannot read the parquet file {path}: {first_line(error)}") from error


def _files(cfg, split: str) -> list[str]:
    """The parquet files of a split; if there are none, the error lists what `datasets` saved instead."""
    try:
        return files_of(cfg, split, ".parquet")
    except DataError:
        base = root_of(cfg)
        saved = sorted(file.parent.name for file in base.glob("*/state.json"))
        if saved:
            raise DataError(
                f"data.root={cfg.root} has no split {split!r}, only {', '.join(saved)}: set data.train_split= and "
                "data.val_split="
            ) from None
        if is_file(base / "state.json"):
            raise DataError(
                f"data.root={cfg.root} is a single data set: expected a folder for each split, {cfg.train_split} and "
                f"{cfg.val_split}, as save_to_disk writes a DatasetDict; train_test_split of `datasets` makes one"
            ) from None
        raise


def _saved(cfg, split: str) -> Path | None:
    """The folder that `datasets` wrote for a split with save_to_disk, if there is one under cfg.root."""
    folder = root_of(cfg) / split
    return folder if is_file(folder / "state.json") else None


def _rows(datasets, table, cfg, split: str) -> Arrow:
    for option in ("image_key", "label_key"):
        check_column(table, cfg, option, split)
    column, where = table.select_columns(cfg.label_key).with_format("arrow")[:], f"{cfg.name}, split {split!r}"
    labels = numbers(column[cfg.label_key].to_numpy(), where, cfg.label_key)
    return Arrow(images_of(datasets, table, cfg, ["image_key"], where), cfg.image_key, labels, where)


def images_of(datasets, table, cfg, options: Sequence[str], where: str) -> Any:
    """The columns that some options name, with `bytes` and `path` of each image. Raises DataError for other types."""
    images = table.select_columns([cfg[option] for option in options])
    for option in options:
        check_images(images.data.schema, cfg, option, where)
        kind = str(images.data.schema.field(cfg[option]).type)
        if kind in LARGE:  # which older versions of `datasets` do not cast to images
            images = images.cast_column(cfg[option], datasets.Value(LARGE[kind]))
        images = images.cast_column(cfg[option], datasets.Image(decode=False))
    return images


def check_images(schema: Any, cfg, option: str, where: str) -> None:
    """Raise DataError unless the column that cfg[option] names has encoded images, or the names of their files."""
    from pyarrow import types

    kind = schema.field(cfg[option]).type
    fields = {field.name for field in kind} if types.is_struct(kind) else set()
    if str(kind) not in ENCODED and not fields & {"bytes", "path"}:
        raise DataError(
            f"{where}: the column {cfg[option]!r} holds {kind}: expected one encoded image per row, as bytes or as a "
            f"struct of `bytes` and `path`; set data.{option}= to another column, or cast it to Image() of `datasets`"
        )


def numbers(column: Any, where: str, key: str) -> np.ndarray:
    """Labels, (N,) int64. Raises DataError for a column of anything but whole numbers, one per row."""
    row, cell = next(((row, cell) for row, cell in enumerate(column) if cell is not None), (0, 0))
    if np.ndim(cell):
        raise DataError(
            f"{where}: the column {key!r} holds several labels, {NAMES.repr(np.asarray(cell).tolist())} at row {row}: "
            "expected one per image, the number of a class; set data.label_key= to another column"
        )
    found = np.asarray(column)
    whole = found.dtype.kind in "iub" or (found.dtype.kind == "f" and (found == np.floor(found)).all())
    if len(found) and not whole:
        row, value = next((row, value) for row, value in enumerate(found.tolist()) if not _is_whole(value))
        value = value.item() if isinstance(value, np.generic) else value
        value = None if value != value else value  # missing values in a column of numbers are NaN
        raise DataError(
            f"{where}: the column {key!r} holds {NAMES.repr(value)} at row {row}, expected the number of a class: set "
            "data.label_key= to another column, or number the classes with class_encode_column of `datasets`"
        )
    return found.astype(np.int64)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and value == value // 1
