"""Images in folders named after their classes, ImageNet's layout: train/<class>/*.jpg and val/<class>/*.jpg."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recipes.console import note
from recipes.data.encoded import Files
from recipes.data.errors import DataError
from recipes.data.files import Packed, files_below, note_once, replace_file, root_of, sidecar
from zoo.errors import listed
from zoo.files import is_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VALIDATION = "validation"  # the default of data.val_split
RACY = 2_000_000_000  # ns; a folder changed this shortly before it was read may change again within one clock tick


class Folder(Files):
    """The images of one split."""

    def __init__(self, root: Path, listing: "Listing"):
        self.root = root
        named = [os.fsencode(f"{cls}{os.sep}{file}") for cls, files in listing.classes.items() for file in files]
        self.names = Packed(named)
        counts = [len(files) for files in listing.classes.values()]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def where(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))


@dataclass
class Listing:
    """The result of a scan.

    classes  class folder -> image files below it, both sorted, without hidden ones
    folders  every folder that was read, relative -> its change time in ns, which unlike the time of modification is
             not set back by tools that copy times, such as tar and rsync
    scanned  time of the scan, in ns since the epoch
    others   suffix -> number of files that have it, and are no images by it
    """

    classes: dict[str, list[str]]
    folders: dict[str, int]
    scanned: int
    others: dict[str, int] = field(default_factory=Counter)


def load(cfg, splits: Sequence[str]) -> tuple[list[Folder], list[str]]:
    """Images of each split ("train", "val"), and the sorted class names, from the folder cfg.root.

    The splits are in the folders cfg.train_split and cfg.val_split, where `validation` also stands for val/.
    Raises DataError for a missing folder, an empty class, or a validation class that training does not have.
    """
    if cfg.root is None:
        raise DataError("data=imagefolder needs data.root=<folder with train/ and val/>")
    base = root_of(cfg)
    if not is_folder(base):
        raise DataError(f"data.root={cfg.root} is not a folder: expected one with train/ and val/")
    folders = [_of_split(base, split, cfg[f"{split}_split"]) for split in splits]
    listings = [list_classes(folder) for folder in folders]
    if len(listings) == 2:
        _number_alike(folders, listings)
    return list(map(Folder, folders, listings)), list(map(_in_unicode, listings[-1].classes))


def _in_unicode(name: str) -> str:
    """A folder's name for tables and pictures: bytes that are not UTF-8, as from an old archive, are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _of_split(base: Path, split: str, name: str) -> Path:
    """The folder of a split; `validation`, the default for all sources, also means val/, but not if both exist."""
    places = ["val", name] if name == VALIDATION else [name]
    found = [base / place for place in places if is_folder(base / place)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{base} has both val/ and {name}/: give data.val_split=val, or move one of them away")
    there = listed(sorted(entry.name for entry in os.scandir(base) if not entry.name.startswith(".")))
    raise DataError(
        f"{base} has no folder {places[0]}/: expected train/ and val/, or what data.{split}_split= names, with one "
        f"subfolder per class; found {there or 'nothing'}"
    )


def list_classes(folder: Path) -> Listing:
    """The class folders in `folder` and their images. Raises DataError if there are none, or one has no images."""
    try:
        listing = _cached(folder) or _scan(folder)
    except OSError as error:  # no permission, a folder that vanished, a network drive that went away
        raise DataError(f"cannot list {folder}: {error}") from error
    if not listing.classes:
        raise DataError(f"{folder} has no class folders: expected {folder}/<class>/<image>")
    for name, files in listing.classes.items():
        if not files:
            raise DataError(
                f"the class folder {folder / name} has no image ({', '.join(SUFFIXES)}): add some or remove the folder"
            )
    if listing.others:
        most = sorted(listing.others.items(), key=lambda pair: (-pair[1], pair[0]))[:4]
        said = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in most)
        count = sum(listing.others.values())
        note_once(f"{folder}: {count} files are left out, as they are not {', '.join(SUFFIXES)}: {said}")
    return listing


def _number_alike(folders: list[Path], listings: list[Listing]) -> None:
    """Give validation all classes of training, without images if it lacks the folder.

    Raises DataError if it has others.
    """
    train, val = (listing.classes.keys() for listing in listings)
    only = [(folder.name, sorted(names)[:8]) for folder, names in zip(folders, (train - val, val - train), strict=True)]
    if val - train:
        said = "; ".join(f"only in {name}/: {', '.join(names)}" for name, names in only if names)
        raise DataError(
            f"the class folders of {folders[0]} and {folders[1]} differ: {said}. Both must have the same folders"
        )
    listings[1].classes = {name: listings[1].classes.get(name, []) for name in train}


def _scan(folder: Path) -> Listing:
    """List the class folders and cache the listing for the next run."""
    listing = Listing({}, {}, time.time_ns())
    listing.folders[""] = os.stat(folder).st_ctime_ns
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.name.startswith(".") and entry.is_dir():
            listing.classes[entry.name] = sorted(
                files_below(folder, entry.name, SUFFIXES, listing.folders, others=listing.others)
            )
    if max(listing.folders.values()) < listing.scanned - RACY:
        _keep(folder, listing)
    return listing


def _sidecar(folder: Path) -> Path | None:
    return sidecar("listings", str(folder.resolve()), ".json")


def _cached(folder: Path) -> Listing | None:
    """The cached listing if no folder in it was changed since; None if there is none or it is out of date."""
    path = _sidecar(folder)
    if path is None:
        return None
    try:
        listing = Listing(**json.loads(path.read_text("utf-8")))
        fresh = all(os.stat(folder / name).st_ctime_ns == time for name, time in listing.folders.items())
    except FileNotFoundError:  # never listed, or a folder is gone
        return None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        note(f"the cached listing {path} cannot be read ({error}): scanning {folder} again")
        return None
    return listing if fresh else None


def _keep(folder: Path, listing: Listing) -> None:
    replace_file(_sidecar(folder), json.dumps(vars(listing)).encode(), f"the listing of {folder}")
