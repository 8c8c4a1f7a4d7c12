"""Images with label maps: two folders of files, or two columns of parquet files.

A mask is a single-channel PNG (palettes are read as indices) whose values are classes; 255 is unlabelled.

ADE20K       images/training/*.jpg, annotations/training/*.png; 0 is no class, 1 the first: data.reduce_zero_label
Cityscapes   leftImg8bit/train/<city>/*_leftImg8bit.png, gtFine/train/<city>/*_gtFine_labelIds.png; data.label_ids
Pascal VOC   JPEGImages/*.jpg, SegmentationClass/*.png, and a list of names for each split
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from recipes.data import arrow
from recipes.data.encoded import Files
from recipes.data.errors import DataError, Misread
from recipes.data.files import Packed, content_of, files_below, root_of
from recipes.data.folder import SUFFIXES
from recipes.data.images import open_labels
from recipes.data.paired import IGNORE
from zoo.files import is_file, is_folder

ADVICE = (
    "Set data.num_classes= or data.class_names= to the classes of the masks, or data.label_ids= to the values that "
    "stand for them, or, if only this mask is wrong, data.on_bad_image=replace"
)


class Classes:
    """The meaning of the values in a mask: class numbers, unless `ids` lists the values of class 0, 1, ...

    count  number of classes, once it is known; a value that `ids` maps to a higher one is an error
    """

    def __init__(self, ids: list[int] | None):
        self.ids, self.table, self.count = ids, None, IGNORE
        if ids is not None:
            self.table = np.full(256, IGNORE, np.uint8)
            self.table[list(map(int, ids))] = np.arange(len(ids))

    def __call__(self, labels: np.ndarray, where: str) -> np.ndarray:
        if self.table is None:
            return labels
        if labels.size and (labels.min() < 0 or labels.max() > 255):
            beyond = labels.min() if labels.min() < 0 else labels.max()
            raise Misread(f"the mask of {where} has label {beyond}: expected 0 ... 255", ADVICE)
        found = self.table[labels]
        beyond = (found >= self.count) & (found != IGNORE)
        if beyond.any():
            row, column = np.argwhere(beyond)[0].tolist()
            raise Misread(
                f"the mask of {where} has label {labels[row, column]} at row {row}, column {column}, which stands for "
                f"class {found[row, column]}: expected classes 0 ... {self.count - 1}",
                ADVICE,
            )
        return found


class MaskFiles(Files):
    """Images and masks of one split; `names` are pairs of paths below `root`."""

    def __init__(self, root: Path, names: list[tuple[str, str]], classes: Classes):
        self.root, self.classes = root, classes
        self.names = Packed([os.fsencode(name) for pair in names for name in pair])

    def __len__(self) -> int:
        return len(self.names) // 2

    def where(self, index: int) -> str:
        return self._path(2 * index)

    def semantic(self, index: int) -> np.ndarray:
        path = self._path(2 * index + 1)
        return self.classes(open_labels(path, path, self.decoding), self.where(index))

    def _path(self, number: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[number]))


class MaskRows(arrow.Arrow):
    """Rows of an Arrow table with a column of images and one of masks."""

    def __init__(self, table: Any, image_key: str, mask_key: str, classes: Classes, name: str):
        super().__init__(table, image_key, np.zeros(len(table), np.int64), name)
        self.mask_key, self.classes = mask_key, classes

    def semantic(self, index: int) -> np.ndarray:
        where = self.where(index)
        return self.classes(open_labels(self.file(index, self.mask_key), f"the mask of {where}", self.decoding), where)


def values_of(records: Any) -> list[int] | None:
    """The values that stand for class 0, 1, ... in the masks of `records`; None for the numbers themselves."""
    return records.classes.ids if isinstance(records, MaskFiles | MaskRows) else None


def load(cfg, splits: Sequence[str], size: tuple[int, int], kind: str) -> tuple[list[Any], list[str]]:
    """Images and masks of each split ("train", "val"), and class names, as described by the `data` group.

    Raises DataError for missing folders, lists and columns, for images without a mask, and for names that lead out of
    their folder.
    """
    if cfg.reduce_zero_label and cfg.label_ids is not None:
        raise DataError(
            f"data.reduce_zero_label=true and data.label_ids={list(cfg.label_ids)} both say what the values of a mask "
            "mean: set data.label_ids=null or data.reduce_zero_label=false"
        )
    ids = list(range(1, IGNORE)) if cfg.reduce_zero_label else cfg.label_ids
    if ids is not None and (len(set(ids)) < len(ids) or not set(ids) <= set(range(256))):
        raise DataError(f"data.label_ids={list(ids)}: expected different numbers, each 0 ... 255")
    classes = Classes(ids)
    read = _rows if cfg.source == "arrow_masks" else _files
    found = [read(cfg, split, classes) for split in splits]
    names = class_names(cfg)  # last, as names may be in a file beside the images: a missing folder is reported first
    if not cfg.reduce_zero_label and ids is not None and len(ids) != len(names):
        raise DataError(f"data.label_ids has {len(ids)} values for {len(names)} classes: expected one value per class")
    if cfg.reduce_zero_label and len(names) > len(ids):
        raise DataError(
            f"data={cfg.name} has {len(names)} classes: expected at most {len(ids)} with data.reduce_zero_label=true, "
            f"which are the values 1 ... {ids[-1]} of a mask"
        )
    classes.count = len(names)
    return found, names


def class_names(cfg) -> list[str]:
    """data.class_names: a list, or a file below data.root; else the numbers of data.num_classes classes.

    Raises DataError for values that are not names, for fewer than two, for duplicates, as results go by name, and for
    another number than data.num_classes.
    """
    names = _given_names(cfg)
    if len(names) < 2:
        raise DataError(
            f"data={cfg.name} has {len(names)} class{'es' * (len(names) != 1)}: expected two or more, such as "
            f"background and object, in data.num_classes= or data.class_names=. {IGNORE} in a mask is not a class"
        )
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(
            f"data.class_names: several classes of data={cfg.name} have the name {twice!r}: give each its own name"
        )
    if cfg.num_classes not in (None, len(names)):
        raise DataError(
            f"data.num_classes={cfg.num_classes}, but data.class_names has {len(names)}: give only the latter"
        )
    return names


def _given_names(cfg) -> list[str]:
    if isinstance(cfg.class_names, str) and cfg.root is not None:
        return _names_of_file(root_of(cfg) / safe(cfg.class_names, "data.class_names"))
    if cfg.class_names is not None and not isinstance(cfg.class_names, str):
        return _texts(cfg.class_names)
    if cfg.num_classes is None:
        raise DataError(f"data={cfg.name} needs data.num_classes=, or data.class_names=[first,second,...]")
    return [str(label) for label in range(cfg.num_classes)]


def _texts(given: Any) -> list[str]:
    """A list of names; numbers become text. Raises DataError for anything else that a file may hold."""
    if not isinstance(given, Sequence):
        raise DataError(f"data.class_names={given}: expected a list of names, or a file of them below data.root")
    names = [str(name) if type(name) in (int, float) else name for name in given]
    for name in names:
        if not isinstance(name, str):
            raise DataError(
                f"data.class_names has {json.dumps(name, default=str)}, which is not text: write such names in quotes, "
                """'data.class_names=["true","null"]' on the command line; in a file also yes, no, on and off"""
            )
    return names


def _names_of_file(path: Path) -> list[str]:
    """One name per line; for a table, the last column without the header, which ADE20K's has."""
    try:
        lines = content_of(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the names of the classes: {error}; give data.class_names=[...]") from error
    rows = [line.split("\t") for line in lines if line.strip()]
    header = bool(rows) and len(rows[0]) > 1 and not rows[0][0].strip().isdecimal()  # else it is a class's number
    return [row[-1].strip() for row in rows[header:]]


def _files(cfg, split: str, classes: Classes) -> MaskFiles:
    root, (images, masks) = places(cfg, split, ("images", "masks"))
    for folder in (images, masks):
        if not is_folder(root / folder):
            raise DataError(f"{root} has no folder {folder}: expected {images} and {masks} for data={cfg.name}")
    found = _listed(cfg, root, images, split) if cfg[f"{split}_list"] else _walked(root / images, cfg.image_suffix)
    if not found:
        raise DataError(f"{root / images} has no image (*{cfg.image_suffix or ', *'.join(SUFFIXES)})")
    pairs = [(f"{images}/{name}", f"{masks}/{_stem(name, cfg.image_suffix)}{cfg.mask_suffix}") for name in found]
    missing = [pair for pair in pairs if not is_file(root / pair[1])]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(pairs)} images in {root / images} have no mask: for {missing[0][0]} expected "
            f"{missing[0][1]}; data.mask_suffix={cfg.mask_suffix} replaces the suffix of the image in the mask's name"
        )
    return MaskFiles(root, pairs, classes)


def _walked(folder: Path, suffix: str | None) -> list[str]:
    try:
        return sorted(files_below(folder, "", (suffix.lower(),) if suffix else SUFFIXES))
    except OSError as error:
        raise DataError(f"cannot list the images: {error}") from error


def _listed(cfg, root: Path, images: str, split: str) -> list[str]:
    """The images that a list names, one per line, without suffix."""
    path = root / safe(cfg[f"{split}_list"], f"data.{split}_list")
    try:
        names = [line.strip() for line in content_of(path).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of the split {split!r}: {error}") from error
    found = [f"{safe(name, str(path))}{cfg.image_suffix or '.jpg'}" for name in names]
    lost = [name for name in found if not is_file(root / images / name)]
    if lost:
        raise DataError(f"{path} names {lost[0].rpartition('.')[0]}, but {root / images / lost[0]} does not exist")
    return found


def places(cfg, split: str, kinds: Sequence[str]) -> tuple[Path, list[str]]:
    """data.root, and the path below it in data.<split>_<kind> for each of the kinds. Raises DataError without one."""
    keys = [f"{split}_{kind}" for kind in kinds]
    for key in keys:
        if cfg[key] is None:
            raise DataError(f"data={cfg.name} needs data.{key}=<a path below data.root>")
    paths = [safe(cfg[key], f"data.{key}") for key in keys]
    if cfg.root is None:
        raise DataError(f"data={cfg.name} needs data.root=<folder with {' and '.join(paths)}>")
    return root_of(cfg), paths


def safe(name: str, where: str) -> str:
    """Return a relative path that stays below its folder. Raises DataError for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DataError(f"{where} names {name!r}, which leads out of its folder: expected a path below it")
    return name


def _stem(name: str, suffix: str | None) -> str:
    if suffix and name.lower().endswith(suffix.lower()):  # as `_walked` finds them
        return name[: -len(suffix)]
    return name if suffix else os.path.splitext(name)[0]


def _rows(cfg, split: str, classes: Classes) -> MaskRows:
    name = cfg[f"{split}_split"]
    datasets = arrow.package(cfg)
    table, _ = arrow.table_of(datasets, cfg, name)
    for option in ("image_key", "mask_key"):
        arrow.check_column(table, cfg, option, name)
    where = f"{cfg.name}, split {name!r}"
    columns = arrow.images_of(datasets, table, cfg, ["image_key", "mask_key"], where)
    return MaskRows(columns, cfg.image_key, cfg.mask_key, classes, where)
