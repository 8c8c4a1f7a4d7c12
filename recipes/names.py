"""Names for files and folders: in tables, as little of each path as tells them apart, and of files about them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count, takewhile
from pathlib import Path

LONGEST = 255  # bytes of a file's name


def at_home(path: str) -> str:
    """The path with a user's home folder in the place of `~`. Raises OSError if this user has none."""
    found = os.path.expanduser(path)
    if found == "~" or found.startswith(f"~{os.sep}"):
        raise OSError("this user has no home folder that ~ could stand for: give the whole path, or set HOME")
    return found


def apart(paths: Sequence[str | Path], *, tail: bool = False) -> list[str]:
    """The paths without the leading folders that all of them share; different paths stay different.

    tail  also leave out what all of them end with, such as `checkpoints/best/model.safetensors` of two runs
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    front = _shared([own[:-1] for own in parts])
    parts = [own[front:] for own in parts]
    back = _shared([own[:0:-1] for own in parts]) if tail else 0
    return [os.path.join(*own[: len(own) - back]) for own in parts]


def part(name: str) -> str:
    """A path or an address, hf-hub:user/name, as a part of a file's name."""
    return re.sub(r"[/\\:\0]", "-", name)


def file_names(paths: Sequence[str], own: Sequence[str], ending: str = "") -> list[str]:
    """Names for files about each path: its `own`, the path where two of these are equal, and a number where two paths
    give the same. A name that is too long for a file loses its beginning.

    ending  the longest that is to follow a name
    """
    taken: dict[str, None] = {}
    own, longest = [_plain(name) for name in own], LONGEST - len(ending)
    times = Counter(own)
    for path, name in zip(paths, own, strict=True):
        name = _plain(path) if times[name] > 1 else name
        numbers = chain([""], (f"-{number}" for number in count(2)))
        possible = (f"{_end(name, longest - len(number))}{number}" for number in numbers)
        taken[next(each for each in possible if each not in taken)] = None
    return list(taken)


def _plain(name: str) -> str:
    """Without leading dots and slashes, which would hide a file or make its name look like an option."""
    return part(name.lstrip("./"))


def _end(name: str, longest: int) -> str:
    """What of a name fits into so many bytes."""
    while len(os.fsencode(name)) > longest:
        name = name[1:].lstrip(".-")
    return name


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """How many leading parts are the same in all of them."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(takewhile(bool, same))
