"""Names in tables for files and folders: as little of each path as tells them apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import takewhile
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


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """How many leading parts are the same in all of them."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(takewhile(bool, same))
