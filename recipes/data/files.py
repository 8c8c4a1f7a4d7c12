"""The files of data sets, and what is cached about them for the next run."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ops.tool import replaced
from recipes.console import note
from recipes.data.errors import DataError
from recipes.names import at_home
from zoo.errors import printable
from zoo.files import is_folder

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # suffixes of compressed files
HOMELESS = "this user has no home folder; set HOME, or XDG_CACHE_HOME to a folder for caches"


class Packed:
    """Byte strings in one: a worker copies every object that it touches, and there may be a million of them."""

    def __init__(self, parts: Sequence[bytes]):
        self.ends, self.text = np.cumsum([0, *map(len, parts)]), b"".join(parts)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.ends[index] : self.ends[index + 1]]


@contextmanager
def looking(cfg) -> Iterator[None]:
    """Raise DataError for what a reader cannot look at: others' folders, or those of a drive that went away."""
    try:
        yield
    except OSError as error:
        given = f"data.root={cfg.root}" if cfg.root else f"data={cfg.name}"
        advice = ": expected a folder that this user may read and enter, as well as those around it"
        raise DataError(f"cannot read {given}: {error}{advice * isinstance(error, PermissionError)}") from error


def root_of(cfg) -> Path:
    """The folder that data.root= names. Raises OSError if it begins with `~` and this user has no home folder."""
    return Path(at_home(cfg.root))


def files_of(cfg, split: str, suffix: str) -> list[str]:
    """The files of a split under cfg.root: named after it, or in a folder that is.

    Raises DataError without any, and for a file that may belong to cfg.train_split as well as to cfg.val_split.
    """
    if cfg.root is None:
        raise DataError(f"data={cfg.name} needs data.root=<folder with *{suffix} files named after their splits>")
    base = root_of(cfg)
    if not is_folder(base):
        raise DataError(f"data.root={cfg.root} is not a folder: expected one with the {suffix} files of {cfg.name}")
    splits = {cfg.train_split, cfg.val_split, split}
    there = _there(cfg, base, split, suffix)
    files = [file for file in there if file.suffix == suffix]
    others = [file for file in there if file.suffix in COMPRESSED and file.with_suffix("") not in files]
    chosen, compressed = (
        [file for file in some if _split_of(file.relative_to(base), splits) == split] for some in (files, others)
    )
    if not chosen:
        found = ", ".join(str(file.relative_to(base)) for file in (*files[:5], *compressed[:5])) or "none"
        if saved := next(base.rglob("*/state.json"), None):
            there = saved.parent.parent  # with a folder for each split
            found += f". Read the output of save_to_disk of `datasets` with data.source=arrow data.root={there}"
        raise DataError(
            f"data.root={cfg.root} has no {suffix} files of the split {split!r}: expected names such as "
            f"{split}-00000{suffix} or a folder {split}/, or other names in data.train_split= and data.val_split=; "
            f"found: {found}"
        )
    for file in chosen:
        try:
            check_kind(file)
        except OSError as error:
            raise DataError(f"cannot read the {suffix} files of the split {split!r}: {error}") from error
    if compressed:
        first = compressed[0].relative_to(base)
        note_once(f"{cfg.name}, split {split!r}: {len(compressed)} compressed files are left out, such as {first}")
    return [str(file) for file in chosen]


def _split_of(file: Path, splits: Collection[str]) -> str | None:
    """The split whose name is a word in the name of the file, train-0001 or in1k-train_07, else of the nearest folder.

    Raises DataError if the names of two are.
    """
    for part in (file.stem, *reversed(file.parts[:-1])):
        named = [split for split in sorted(splits) if re.fullmatch(rf"(.*[-_.])?{re.escape(split)}([-_.].*)?", part)]
        if len(named) > 1:
            raise DataError(
                f"{file} may belong to {' and '.join(map(repr, named))}, as {part!r} has both words: give it the name "
                "of one split, or set data.train_split= and data.val_split= to words that tell them apart"
            )
        if named:
            return named[0]
    return None


def _there(cfg, base: Path, split: str, suffix: str) -> list[Path]:
    """The files below a folder with a suffix, compressed ones too, sorted; notes which folders cannot be read.

    There may be others' below `base`, or lost+found.
    """
    unread: list[OSError] = []
    suffixes = (suffix, *(suffix + end for end in COMPRESSED))
    try:
        found = files_below(base, "", suffixes, unread=unread)
    except OSError as error:
        raise DataError(f"cannot list data.root={cfg.root}: {error}") from error
    for error in unread:
        note_once(f"{cfg.name}, split {split!r}: a folder is left out: {error}")
    return sorted(base / name for name in found)


def files_below(
    folder: Path,
    below: str,
    suffixes: tuple[str, ...],
    folders: dict[str, int] | None = None,
    parents: frozenset[tuple[int, int]] = frozenset(),
    others: Counter[str] | None = None,
    unread: list[OSError] | None = None,
) -> list[str]:
    """The files under folder/below, relative to that; links are followed, but not back to a parent folder.

    suffixes  of the files, in lower case; names may be in upper case
    folders   filled with every folder that is read, relative to `folder` -> its change time in ns
    others    counts the suffixes of the files that are left out
    unread    filled with the errors of folders that may not be read; without it they are raised
    """
    status = os.stat(folder / below)
    if (status.st_dev, status.st_ino) in parents:
        return []
    parents |= {(status.st_dev, status.st_ino)}
    if folders is not None:
        folders[below] = status.st_ctime_ns
    found = []
    with os.scandir(folder / below) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                child = os.path.join(below, entry.name)
                try:
                    inside = files_below(folder, child, suffixes, folders, parents, others, unread)
                except PermissionError as error:
                    if unread is None:
                        raise
                    unread.append(error)
                    continue
                found += [os.path.join(entry.name, name) for name in inside]
            elif entry.name.lower().endswith(suffixes):
                found.append(entry.name)
            elif others is not None:
                others[os.path.splitext(entry.name.lower())[1]] += 1
    return found


def check_kind(path: str | Path) -> None:
    """Raise OSError for a pipe or a device: opening one may wait for ever, and reading it may never end."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise OSError(f"{path} is a pipe or a device: expected a file")


def content_of(path: Path) -> bytes:
    """The bytes of a file. Raises OSError if there is none, or it cannot be read."""
    check_kind(path)
    return path.read_bytes()


def is_local(path: str) -> bool:
    """Whether a path is a local file, not a URL."""
    return "://" not in path


def stamp(path: str | Path) -> str:
    """The path, the size in bytes and the times of modification and of change in ns; a URL is its own stamp.

    Tools that copy times, such as tar, rsync and cp -p, set the first time, but not the second.
    Raises DataError if the file is gone.
    """
    if not is_local(str(path)):
        return str(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. Is the folder still there?") from error
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"


def same_content(one: str, other: str) -> bool:
    """Whether two stamps agree but for the time of change, which a chmod or a backup's hard link sets too."""
    return one.split("\0")[:3] == other.split("\0")[:3]


def sidecar(kind: str, identity: str, suffix: str) -> Path | None:
    """The cache file for information about the data that `identity` names; None for a user without a home folder."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(at_home("~"), ".cache")
    except OSError:
        return None
    return Path(cache, "attention-backbones", kind, digest(identity, suffix))


def digest(identity: str, suffix: str) -> str:
    """A file name for what `identity` names."""
    return f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:24]}{suffix}"


def replace_file(path: Path | None, content: bytes, what: str) -> None:
    """Write a file of `sidecar` atomically; a cache that cannot be written only costs the next run time."""
    if path is None:
        note(f"{what} is not cached for the next run: {HOMELESS}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        note(f"{what} is not cached for the next run: {error}")


def note_once(text: str) -> None:
    """A note on what every process of a run finds alike, from the first of them."""
    if os.environ.get("RANK", "0") == "0":
        note(printable(text))
