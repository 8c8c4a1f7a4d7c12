"""Names for files and folders: in tables, as little of each path as tells them apart, and of files about them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path


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
    return re.sub(r"[/\\:]", "-", name)


def file_names(paths: Sequence[str], own: Sequence[str]) -> list[str]:
    """Names for files about each path: its `own`, the path where two of these are equal, and a number where two paths
    give the same.
    """
    taken: dict[str, None] = {}
    times = Counter(own)
    for path, name in zip(paths, own, strict=True):
        # without leading dots and slashes, which would hide the file or make its name look like an option
        name = part((path if times[name] > 1 else name).lstrip("./"))
        numbered = (f"{name}-{number}" for number in count(2))
        taken[name if name not in taken else next(other for other in numbered if other not in taken)] = None
    return list(taken)


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """How many leading parts are the same in all of them."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(takewhile(bool, same))
