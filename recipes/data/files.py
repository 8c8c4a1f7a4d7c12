"""The files of data sets, and what is cached about them for the next run."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.console import note
from recipes.data.errors import DataError
from zoo.files import replaced


class Packed:
    """Byte strings in one: a worker copies every object that it touches, and there may be a million of them."""

    def __init__(self, parts: Sequence[bytes]):
        self.ends, self.text = np.cumsum([0, *map(len, parts)]), b"".join(parts)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.ends[index] : self.ends[index + 1]]


def of_split(root: str | None, name: str, split: str, suffix: str) -> list[str]:
    """The files of a split under `root`: named after it, or in a folder that is. Raises DataError without any."""
    if root is None:
        raise DataError(f"data={name} needs data.root=<folder with *{suffix} files named after their splits>")
    base = Path(root).expanduser()
    if not base.is_dir():
        raise DataError(f"data.root={root} is not a folder: expected one with the {suffix} files of {name}")
    files = sorted(file for file in base.rglob(f"*{suffix}") if not file.name.startswith("."))
    chosen = [str(file) for file in files if belongs(file.relative_to(base), split)]
    if not chosen:
        found = ", ".join(str(file.relative_to(base)) for file in files[:5]) or "none"
        if next(base.rglob("*/state.json"), None):
            found += f". Read the output of save_to_disk of `datasets` with data.source=arrow, from {base / split}"
        raise DataError(
            f"data.root={root} has no {suffix} files of the split {split!r}: expected names such as "
            f"{split}-00000{suffix} or a folder {split}/, or other names in data.train_split= and data.val_split=; "
            f"found: {found}"
        )
    return chosen


def belongs(file: Path, split: str) -> bool:
    """Whether the split's name is a word in the name of the file or of a folder: train-0001, in1k-train_07, train/."""
    word = re.compile(rf"(.*[-_.])?{re.escape(split)}([-_.].*)?")
    return any(word.fullmatch(part) for part in (*file.parts[:-1], file.stem))


def is_local(path: str) -> bool:
    """Whether a path is a local file, not a URL."""
    return "://" not in path


def stamp(path: str | Path) -> str:
    """The path, the size in bytes and the modification time in ns; a URL is its own stamp.

    Raises DataError if the file is gone.
    """
    if not is_local(str(path)):
        return str(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. Is the folder still there?") from error
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}"


def sidecar(kind: str, identity: str, suffix: str) -> Path:
    """The cache file for information about the data that `identity` names."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(identity)).hexdigest()[:24]
    return Path(cache, "attention-backbones", kind, f"{name}{suffix}")


def replace_file(path: Path, content: bytes, what: str) -> None:
    """Write a file atomically; a cache that cannot be written only costs the next run time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        note(f"{what} is not cached for the next run: {error}")
