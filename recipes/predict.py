"""A user's own images: which ones a pattern names, and where pictures of the predictions are written."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path

from PIL import Image

from recipes.console import say
from recipes.data.folder import SUFFIXES
from recipes.names import file_names
from recipes.pictures import save_picture
from recipes.settings import RunError, writing
from zoo.files import entries, is_file, unreadable

ENDING = "-found.png"


def matching(pattern: str) -> list[str]:
    """The file of that name, whatever it is; or the images in a folder, or among the matches of a pattern with *.

    Images are recognised by their suffixes, or by that of the pattern; hidden files, and pictures of the predictions
    for other matches, are left out. Raises RunError if there is none, or the folder cannot be read.
    """
    folder = os.path.isdir(pattern)  # Path's own test fails where a name is too long for a file
    if os.path.exists(pattern) and not folder:
        return [pattern]
    try:
        there = [str(path) for path in entries(Path(pattern))] if folder else _matches(pattern)
    except OSError as error:
        raise RunError(f"predict={unreadable(pattern, error)}") from error
    suffixes = SUFFIXES if folder else {*SUFFIXES, Path(pattern).suffix.lower()} - {""}
    found = sorted(path for path in there if _is_image(Path(path), suffixes))
    if not found:
        raise RunError(f"predict={pattern} matches no {'image ' if folder or there else ''}file")
    pictures = set(names(found))
    kept = [path for path in found if Path(path).name not in pictures]
    if len(kept) < len(found):
        say(f"{len(found) - len(kept)} pictures of earlier predictions (*{ENDING}) are left out")
    return kept


def _matches(pattern: str) -> list[str]:
    """The matches of a pattern, or of a name. Raises OSError if their folder cannot be read, where `glob` has none."""
    found, parts = glob.glob(pattern, recursive=True), Path(pattern).parts
    plain = list(takewhile(lambda part: glob.escape(part) == part, parts))
    if not found and len(plain) < len(parts):
        entries(Path(*plain))
    elif not found:
        is_file(pattern)
    return found


def _is_image(path: Path, suffixes: Collection[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and not os.path.isdir(path)


def names(paths: Sequence[str]) -> list[str]:
    """The file name of each image's picture: the image's name, its path where two names are equal, and a number where
    two paths give the same.
    """
    return [f"{name}{ENDING}" for name in file_names(paths, [Path(path).stem for path in paths], ENDING)]


def write(picture: Image.Image, path: Path) -> None:
    """Write a picture, making its folder if needed. Raises RunError if it cannot be written."""
    with writing(f"could not write {path}", "give out=<a writable folder>"):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(picture, path)
    say(f"written: {path}")
