"""A person's own images: which are meant, where the pictures of what is found in them go, and whether they can."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image

from recipes.data.folder import SUFFIXES
from recipes.log import say
from recipes.pictures import save_picture
from recipes.settings import RunError


def matching(pattern: str) -> list[str]:
    """The file of that name, whatever it is; or the images in the folder, or among what a pattern with * names.

    Images are told by their suffixes, or by that of the pattern; hidden files are left out. Raises RunError where there
    is none.
    """
    folder = Path(pattern).is_dir()
    if Path(pattern).exists() and not folder:
        return [pattern]
    there = [str(path) for path in Path(pattern).iterdir()] if folder else glob.glob(pattern, recursive=True)
    suffixes = SUFFIXES if folder else {*SUFFIXES, Path(pattern).suffix.lower()} - {""}
    found = sorted(path for path in there if _is_image(Path(path), suffixes))
    if not found:
        raise RunError(f"predict={pattern} names no file{' of an image' if folder or there else ''}")
    return found


def _is_image(path: Path, suffixes: Collection[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def names(paths: Sequence[str]) -> list[str]:
    """What the picture of each image is called: as the image, or as its path where two are called alike."""
    stems = [Path(path).stem for path in paths]
    alike = {stem for stem in stems if stems.count(stem) > 1}
    chosen = (
        re.sub(r"[/\\:]", "-", path.lstrip("./")) if stem in alike else stem
        for path, stem in zip(paths, stems, strict=True)
    )
    return [f"{name}-found.png" for name in chosen]


def write(picture: Image.Image, path: Path) -> None:
    """Write a picture into a folder, made where it is not there. Raises RunError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(picture, path)
    except OSError as error:
        raise RunError(f"could not write {path}: {error}; give out=<a folder that can be written>") from error
    say(f"written: {path}")


def check_writable(folder: Path) -> None:
    """Raise RunError where results could not be written into a folder that may still have to be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"results cannot be written to {folder}: give out=<a folder that can be written>")
