"""A user's own images: which ones a pattern names, and where pictures of the predictions are written."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path

from PIL import Image

from recipes.console import say
from recipes.data.folder import SUFFIXES
from recipes.pictures import save_picture
from recipes.settings import RunError

ENDING = "-found.png"


def matching(pattern: str) -> list[str]:
    """The file of that name, whatever it is; or the images in a folder, or among the matches of a pattern with *.

    Images are recognised by their suffixes, or by that of the pattern; hidden files, and pictures of the predictions
    for other matches, are left out. Raises RunError if there is none.
    """
    folder = Path(pattern).is_dir()
    if Path(pattern).exists() and not folder:
        return [pattern]
    there = [str(path) for path in Path(pattern).iterdir()] if folder else glob.glob(pattern, recursive=True)
    suffixes = SUFFIXES if folder else {*SUFFIXES, Path(pattern).suffix.lower()} - {""}
    found = sorted(path for path in there if _is_image(Path(path), suffixes))
    if not found:
        raise RunError(f"predict={pattern} matches no {'image ' if folder or there else ''}file")
    pictures = set(names(found))
    kept = [path for path in found if Path(path).name not in pictures]
    if len(kept) < len(found):
        say(f"{len(found) - len(kept)} pictures of earlier predictions (*{ENDING}) are left out")
    return kept


def _is_image(path: Path, suffixes: Collection[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and not path.is_dir()


def names(paths: Sequence[str]) -> list[str]:
    """The file name of each image's picture: the image's name, its path where two names are equal, and a number where
    two paths give the same.
    """
    return [f"{name}{ENDING}" for name in file_names(paths, [Path(path).stem for path in paths])]


def file_names(paths: Sequence[str], own: Sequence[str]) -> list[str]:
    """Names for files about each path: its `own`, the path where two of these are equal, and a number where two paths
    give the same.
    """
    taken: dict[str, None] = {}
    for path, name in zip(paths, own, strict=True):
        # without leading dots and slashes, which would hide the file or make its name look like an option
        name = re.sub(r"[/\\:]", "-", (path if own.count(name) > 1 else name).lstrip("./"))
        numbered = (f"{name}-{number}" for number in count(2))
        taken[name if name not in taken else next(other for other in numbered if other not in taken)] = None
    return list(taken)


def write(picture: Image.Image, path: Path) -> None:
    """Write a picture, making its folder if needed. Raises RunError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(picture, path)
    except OSError as error:
        raise RunError(f"could not write {path}: {error}; give out=<a writable folder>") from error
    say(f"written: {path}")


def check_writable(folder: Path) -> None:
    """Raise RunError if results could not be written to a folder, which may not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"results cannot be written to {folder}: give out=<a writable folder>")
