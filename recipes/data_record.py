"""What a run records about its data in data.json, and checks of later data against it."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from recipes import distributed, json_file
from recipes.console import say
from recipes.data import Data, DataError, Source, dense, imagenet
from recipes.data.build import SPLITS, WORDS, preprocessing
from recipes.data.files import Packed
from recipes.data.shards import Shards
from recipes.json_file import NUMBER
from recipes.settings import RunError, load_config
from zoo.errors import listed
from zoo.files import is_absent, unreadable

FILE = "data.json"
KEYS = ("num_classes", "class_names", "img_size", "left_out")
KINDS = {  # of what it holds; older runs lack what may be None, and have numbers for names that were given as numbers
    "num_classes": int, "class_names": [(str, *NUMBER)], "img_size": (int, [int, int]), "left_out": ([int], None),
    "images": ({"train": int, "val": int}, None), "labels": ({"train": str, "val": str}, None),
    "shards": ([[str, int]], None),
}  # fmt: skip
DRAWN = ("val_fraction", "split_seed")  # keys of `data` by which images are held out that no reader lists, as of scenes
COUNTING = ("arrow", "tar", "parquet")  # readers that may have to count the classes


def of(data: Data) -> dict[str, Any]:
    """What a run that starts on this data records."""
    sources = _sources(data)
    images = {split: len(source) for split, source in sources.items()}
    labels = {split: _digest(source.records, data.truths) for split, source in sources.items()}
    return {**{key: getattr(data, key) for key in KEYS}, "images": images, "labels": labels, "shards": _shards(data)}


def check_alike(data: Data) -> None:
    """Raise DataError, on every process, if one has other data than the first, such as another copy of a folder.

    Compares the classes, the numbers of images, and what readers know of images before reading any: labels or boxes,
    and the names of files in folders.
    """
    if distributed.size() == 1:
        return
    mine = {**of(data), "host": socket.gethostname()}
    first, *others = distributed.gathered(mine)
    found = [
        f"rank {rank} on {other['host']} has {', '.join(said)}"
        for rank, other in enumerate(others, 1)
        if (said := _differences(first, other))
    ]
    if found:
        raise DataError(
            f"the processes of this run do not have the same data. Unlike rank 0 on {first['host']}:\n  "
            + "\n  ".join(found)
            + "\ngive every machine the same files, or all of them one shared folder"
        )


def _sources(data: Data) -> dict[str, Source]:
    """The existing splits: an evaluation has no training set."""
    return {split: source for split in SPLITS if (source := getattr(data, split)) is not None}


def _digest(records: Any, truths: np.ndarray | None) -> str:
    """What a reader knows of the images of a split; runs record it, so that it must not change for the same data."""
    found = hashlib.sha256()
    found.update(np.asarray(getattr(records, "labels", ()), np.int64).tobytes())  # those of masks are in the images
    for said in vars(records).values():  # names of files, and all that a COCO file says
        found.update(said.text if isinstance(said, Packed) else b"")
    if truths is not None:
        found.update(np.asarray(truths, np.int64).tobytes())
    return found.hexdigest()


def _shards(data: Data) -> list[list[Any]] | None:
    """The name of each training shard and the number of its samples; None if the training set is not in shards."""
    records = getattr(data.train, "records", None)
    if not isinstance(records, Shards):
        return None
    return [list(shard) for shard in zip(records.names, records.counts.tolist(), strict=True)]


def _differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What another process has that the first does not have."""
    there, here = first["class_names"], other["class_names"]
    if len(here) != len(there):
        found = [f"{len(here)} classes ({listed(here)}), not {len(there)} ({listed(there)})"]
    else:
        place = _place(there, here)
        found = [] if place is None else [f"{here[place]!r} as class {place}, not {there[place]!r}"]
    counts = {split: (other["images"][split], count) for split, count in first["images"].items()}
    found += [f"{now} {WORDS[split]} images, not {then}" for split, (now, then) in counts.items() if now != then]
    other_labels = other["labels"] != first["labels"]
    return found or (["the same number of images, but other images or other labels"] if other_labels else [])


def read(run: Path) -> dict[str, Any]:
    """What a run recorded, see KINDS; nothing if there is no such file.

    Raises RunError if it is damaged, or cannot be read.
    """
    path = run / FILE
    try:
        recorded = json_file.read(path, KINDS)
    except (IsADirectoryError, ValueError) as error:
        raise RunError(
            f"{path} is not a run's record of its data: {error}; restore it from a copy, or remove it: without it the "
            "run can be resumed and evaluated, but nothing tells whether the data is still the same"
        ) from error
    except OSError as error:
        if is_absent(error):
            return {}
        raise RunError(unreadable(path, error)) from error
    return {**recorded, "class_names": list(map(str, recorded["class_names"]))}


def described(run: Path, cfg: DictConfig) -> Data:
    """The data of a run with configuration `cfg`, without images, for predictions where the data is not available.

    Raises RunError for a run that recorded nothing, and for `data.subset` of classes that it does not have.
    """
    recorded, prep = read(run), preprocessing(cfg)
    if not recorded:
        raise RunError(f"{run} has no {FILE}, which lists its classes: train.py writes it at the start of a run")
    size, chosen = recorded["img_size"], imagenet.subset(cfg.data)
    found = Data(
        train=None,
        val=None,
        num_classes=recorded["num_classes"],
        class_names=recorded["class_names"],
        mean=prep.mean,
        std=prep.std,
        img_size=size if isinstance(size, int) else tuple(size),
        left_out=tuple(recorded.get("left_out", ())),
    )
    if chosen is None:
        return found
    names = imagenet.class_names()
    check_classes(run, replace(found, num_classes=len(names), class_names=names), cfg.data.name)
    return replace(found, class_names=[names[index] for index in chosen], subset=chosen)


def count_classes(run: Path, data: DictConfig) -> None:
    """Give a reader that counts classes the run's number: the validation set may lack the highest."""
    if data.source in COUNTING and data.num_classes is None:
        data.num_classes = read(run).get("num_classes")


def with_classes_of(run: Path, data: Data) -> Data:
    """The data to evaluate a run on, with the run's classes, if its own are some of these in the same order.

    A reader knows the classes of the files that it reads, and validation files may lack some; their labels are
    renumbered as in the run. Dense labels are not renumbered: there only the last classes may be missing.
    """
    there, here = read(run).get("class_names") or [], data.class_names
    if data.subset is not None or data.truths is not None or here == there or len(here) > len(there):
        return data
    here = _own_names(data)
    if here != there[: len(here)]:
        if isinstance(data.val, dense.Dense) or here != [name for name in there if name in here]:
            return data
        records = data.val.records
        records.labels = np.array([there.index(name) for name in here])[records.labels]
    return replace(data, num_classes=len(there), class_names=there)


def _own_names(data: Data) -> list[str]:
    """The names of the data's classes, without the numbers that `model.num_classes` appends for those without images.

    If the data lacks some of the run's classes, these numbers stand where the missing names would be, and a comparison
    by name fails.
    """
    names = data.class_names
    count = next((place for place in range(len(names), 0, -1) if names[place - 1] != str(place - 1)), 0)
    if count == len(names) or isinstance(data.val, dense.Dense):
        return names
    return names[: max(count, int(data.val.records.labels.max(initial=-1)) + 1)]


def check_classes(run: Path, data: Data, name: str) -> None:
    """Raise RunError if a run is to be evaluated on a data set, called `name`, with other classes than its own."""
    said = _other_classes(read(run), data)
    if said is not None:
        raise RunError(
            f"run={run} cannot be evaluated on data={name}: {said}. Give data with the run's classes, in its order; "
            "a file of weights, checkpoint=, is evaluated whatever its classes are called"
        )


def say_other_images(run: Path, data: Data, cfg: DictConfig) -> None:
    """Warn if a run is evaluated on other images of its own data set, `cfg`, than while it trained: some may be those
    that it learned from. Older runs recorded less.
    """
    stored = load_config(run).data
    if cfg.name != stored.name or data.subset is not None or data.truths is not None:
        return
    recorded, current = read(run), of(data)
    pairs = [((recorded.get(what) or current[what])["val"], current[what]["val"]) for what in ("images", "labels")]
    pairs += [(stored.get(key, cfg.get(key)), cfg.get(key)) for key in DRAWN]
    if any(then != now for then, now in pairs):
        say(
            f"these validation images of data={cfg.name}, or their labels or order, are not those that {run} was "
            "evaluated on as it trained: the scores are not comparable, and it may have been trained on some of them",
            "yellow",
        )


def check_same(run: Path, data: Data) -> None:
    """Raise RunError if a run would be resumed with other classes, training images or labels of them.

    Warns about other validation images: the best score so far was not measured on these. Older runs recorded less.
    """
    recorded, current = read(run), of(data)
    then, now = recorded.get("images"), current["images"]
    lines = [said] if (said := _other_classes(recorded, data)) else []
    if then is not None and then["train"] != now["train"]:
        lines.append(f"the run has {then['train']} training images, the data {now['train']}")
    if said := _other_shards(recorded.get("shards"), current["shards"]):
        lines.append(said)
    labels = recorded.get("labels") or current["labels"]
    others = {split for split, digest in current["labels"].items() if digest != labels[split]}
    if "train" in others and not lines:
        lines.append("the data has as many training images, but other images or other labels")
    if lines:
        raise RunError(
            f"{run} was started on other data, and resuming it on this data would mix the two:\n  "
            + "\n  ".join(lines)
            + "\nrestore the data to resume the run, or start a new one (another name=, no resume)"
        )
    if then is not None and then["val"] != now["val"]:
        say(f"validation has {now['val']} images, not {then['val']} as before: scores are not comparable", "yellow")
    elif "val" in others:
        say("validation has other images, or other labels, than before: scores are not comparable", "yellow")


def _other_shards(there: list[list[Any]] | None, here: list[list[Any]] | None) -> str | None:
    """The first training shard that differs; None if none does, or the run or the data has no shards."""
    if there is None or here is None or there == here:
        return None
    place = next(index for index, pair in enumerate(zip_longest(there, here)) if pair[0] != pair[1])
    run, now = (
        f"{shards[place][0]} with {shards[place][1]} images" if place < len(shards) else "none"
        for shards in (there, here)
    )
    return f"shard {place} is {run} in the run and {now} in the data"


def _other_classes(recorded: dict[str, Any], data: Data) -> str | None:
    """How the classes of the data differ from those of a run; None if they do not, as far as their names tell."""
    there, here = recorded.get("class_names") or [], data.class_names
    count = recorded.get("num_classes", data.num_classes)
    if count != data.num_classes:
        return f"the run has {count} classes ({listed(there)}), the data {data.num_classes} ({listed(here)})"
    counted = _only_counted(there) or _only_counted(here)
    if data.subset is not None or data.truths is not None or (counted and not _nested(there, here)):
        return None
    place = _place(words(there), words(here))
    if place is None:
        return None
    first = f"class {place} is {there[place]!r} in the run and {here[place]!r} in the data"
    hint = "; folders sort as text, 10 before 2, unless their numbers have leading zeros" if counted else ""
    return f"{first} (the run: {listed(there)}; the data: {listed(here)}){hint}"


def _place(there: Sequence[str], here: Sequence[str]) -> int | None:
    """The first class with another name; None without one."""
    pairs = zip(there, here, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), None)


def _only_counted(names: Sequence[str]) -> bool:
    return all(name == str(index) for index, name in enumerate(names))


def _nested(there: Sequence[str], here: Sequence[str]) -> bool:
    """Whether one has all names of the other: numbers that were counted then name the same classes, as folders do."""
    return set(there) <= set(here) or set(here) <= set(there)


def words(names: Sequence[str]) -> Sequence[str]:
    """The names; ImageNet's synsets as words."""
    return imagenet.class_names() if tuple(names) == tuple(imagenet.synsets()) else names
