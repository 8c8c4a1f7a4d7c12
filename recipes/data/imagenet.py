"""ImageNet-1k and the evaluation sets with its classes: ImageNet-V2, -A, -R and the labels of ReaL.

A class is identified by its synset (n01440764) or number (0 ... 999); the order of folder names is irrelevant.

ImageNet-V2: Recht et al. 2019, https://arxiv.org/abs/1902.10811. ImageNet-A: Hendrycks et al. 2019,
https://arxiv.org/abs/1907.07174. ImageNet-R: Hendrycks et al. 2020, https://arxiv.org/abs/2006.16241. ReaL: Beyer et
al. 2020, https://arxiv.org/abs/2006.07159. Their classes and labels are those shipped with timm.
"""

import json
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from recipes.data import arrow
from recipes.data.encoded import Encoded
from recipes.data.errors import DataError
from recipes.data.files import files_below, note_once, root_of
from recipes.data.folder import VALIDATION, Folder, list_classes
from zoo.errors import listed
from zoo.files import is_folder

PLACES = {"train": ("train",), "val": ("val", VALIDATION, "valid")}
SYNSET, NUMBER = re.compile(r"n\d{8}"), re.compile(r"\d{1,4}")
PUBLISHED = re.compile(r"ILSVRC2012_val_(\d{8})")  # the name that a validation image was published under


@cache
def synsets() -> tuple[str, ...]:
    """The synset of each of the thousand classes."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def class_names() -> tuple[str, ...]:
    """The first name of each of the thousand classes."""
    return tuple(text.split(",")[0] for text in ImageNetInfo("imagenet-1k").label_descriptions())


def subset(cfg) -> tuple[int, ...] | None:
    """The classes, of the thousand, that `data.subset` restricts predictions to; None for all."""
    if cfg.subset is None:
        return None
    return tuple(int(line) for line in _carried(f"imagenet_{cfg.subset}_indices.txt").split())


def truths(records: Encoded) -> np.ndarray:
    """ReaL's labels of validation images: (N, most) int64, padded with -1; an image may have none, or many.

    Raises DataError for an image that does not have its published name (ILSVRC2012_val_00000001).
    """
    real = json.loads(_carried("imagenet_real_labels.json"))
    rows = [real[_number(records, index, len(real)) - 1] for index in range(len(records.labels))]
    found = np.full((len(rows), max(map(len, rows), default=0) or 1), -1, np.int64)
    for row, labels in zip(found, rows, strict=True):
        row[: len(labels)] = labels
    return found


def _carried(name: str) -> str:
    return (files("timm.data") / "_info" / name).read_text("utf-8")


def _number(records: Encoded, index: int, count: int) -> int:
    name = records.name_of(index)
    match = PUBLISHED.search(name)
    if match is None or not 0 < int(match[1]) <= count:
        raise DataError(
            f"{records.where(index)}: ReaL identifies images by their published names, ILSVRC2012_val_00000001.JPEG to "
            f"{count:08d}, but this one is {name!r}: give the original validation images, or data=imagenet"
        )
    return int(match[1])


def load(cfg, splits: Sequence[str]) -> tuple[list[Encoded], list[str]]:
    """Images of each split ("train", "val") and the names of the classes: all thousand, or those of `data.subset`.

    cfg.root is a folder of images by class, or of parquet files; without it cfg.hub is loaded from the hub.
    Raises DataError for missing data, and for classes that cannot be identified or are in another order.
    """
    if cfg.root is None and cfg.hub is None:
        raise DataError(f"data={cfg.name} needs data.root=<the folder with its images by class>")
    if cfg.root is not None and not is_folder(root_of(cfg)):
        raise DataError(f"data.root={cfg.root} is not a folder: expected one with images by class, or parquet files")
    if cfg.root is None or _has_tables(root_of(cfg)):
        found, names = arrow.load(cfg, splits)
        _check_order(names, cfg.name)
    else:
        found = [_folder(root_of(cfg), split, cfg[f"{split}_split"]) for split in splits]
        _note_unused(cfg)
    chosen = subset(cfg)
    if chosen is None:
        return found, list(class_names())
    for records in found:
        records.labels = _within(records, chosen, cfg)
    return found, [class_names()[index] for index in chosen]


def _has_tables(root: Path) -> bool:
    """Whether there are parquet files; where there are folders of synsets, their million images are not searched."""
    if any(SYNSET.fullmatch(path.name) for pattern in ("n*", "*/n*") for path in root.glob(pattern)):
        return False
    try:
        return bool(files_below(root, "", (".parquet",), unread=[]))
    except OSError as error:
        raise DataError(f"cannot list data.root={root}: {error}") from error


def _note_unused(cfg) -> None:
    """Note what was given that only parquet files have a use for."""
    own = {"num_classes": len(synsets()), "image_key": "image", "label_key": "label"}
    given = [f"data.{key}={cfg[key]}" for key, value in own.items() if cfg[key] not in (None, value)]
    if given:
        note_once(f"not used for folders that are named after the classes of ImageNet-1k: {', '.join(given)}")


def _folder(root: Path, split: str, name: str) -> Folder:
    folder = _place(root, split, name)
    listing = list_classes(folder)
    numbers = _numbers(list(listing.classes), folder)
    records = Folder(folder, listing)
    records.labels = numbers[records.labels]
    return records


def _place(root: Path, split: str, name: str) -> Path:
    """The folder of class folders: a split's own, the root itself, or the only folder in the root (archives).

    A `name` of the split that is one of the common ones stands for the others too, unless there is its folder;
    `validation`, the default for all sources, must leave no choice. Any other name must be its folder.
    """
    places = PLACES[split] if name in PLACES[split] else (name,)
    there = [place for place in places if is_folder(root / place)]
    if name == VALIDATION and len(there) > 1:
        others = " or ".join(place for place in there if place != VALIDATION)
        raise DataError(f"{root} has {'/ and '.join(there)}/: give data.val_split={others}, or move all but one away")
    if there:
        return root / (name if name in there else there[0])
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if split == "val" and inside and places == PLACES["val"]:
        if any(map(_is_class, inside)):
            return root
        if len(inside) == 1 and any(_is_class(entry.name) for entry in os.scandir(root / inside[0])):
            return root / inside[0]
    found, places = listed(inside) or "no folders", " or ".join(f"{place}/" for place in places)
    raise DataError(
        f"{root} has no {places}: expected it with one folder per class, named "
        f"by synset (n01440764) or number (0 ... 999); found {found}"
    )


def _is_class(name: str) -> bool:
    return bool(SYNSET.fullmatch(name) or NUMBER.fullmatch(name))


def _numbers(names: list[str], folder: Path) -> np.ndarray:
    """The class of each folder."""
    place = {synset: index for index, synset in enumerate(synsets())}
    if all(map(NUMBER.fullmatch, names)):
        place = {name: int(name) for name in names if int(name) < len(synsets())}
    unknown = [name for name in names if name not in place]
    if unknown:
        hint = " Numbers start at 0; in the order of the development kit they mean other classes."
        raise DataError(
            f"{folder} has {len(unknown)} folders that are not named after classes of ImageNet-1k: "
            f"{listed(unknown)}. "
            f"Expected synsets (n01440764) or numbers 0 ... 999, not both.{hint if unknown[0].isdigit() else ''}"
        )
    return np.array([place[name] for name in names], np.int64)


def _within(records: Encoded, chosen: tuple[int, ...], cfg) -> np.ndarray:
    """Labels among the thousand classes, as indices into the chosen ones. Raises DataError for any other label."""
    place = np.full(len(synsets()), -1, np.int64)
    place[list(chosen)] = np.arange(len(chosen))
    found = place[records.labels]
    if (found < 0).any():
        first = int(np.argmax(found < 0))
        other = int(records.labels[first])
        raise DataError(
            f"data.root={cfg.root} holds {synsets()[other]}, which is not one of the {len(chosen)} classes of "
            f"data={cfg.name}: is it another data set? Found {records.where(first)}; expected folders named by "
            f"WordNet ids ({synsets()[chosen[0]]}), or by numbers among all thousand classes, where {other} is "
            f"{synsets()[other]}"
        )
    return found


def _check_order(names: list[str], name: str) -> None:
    """Raise DataError if a file declares its classes in another order than ImageNet-1k's."""
    expected = synsets() if SYNSET.fullmatch(names[0]) else class_names()
    if len(names) != len(expected):
        raise DataError(f"{name} declares {len(names)} classes, expected the {len(expected)} of ImageNet-1k")
    if all(text == str(index) for index, text in enumerate(names)):
        return  # numbers, not names
    # names differ slightly between sources; another order changes nearly all of them
    other = [index for index, text in enumerate(names) if text.split(",")[0].lower() != expected[index].lower()]
    if len(other) > len(expected) // 10:
        first = other[0]
        raise DataError(
            f"{name} has its classes in another order than ImageNet-1k: class {first} is {names[first]!r}, expected "
            f"{expected[first]!r}. Sort its labels by synset, or give folders named by synset"
        )
