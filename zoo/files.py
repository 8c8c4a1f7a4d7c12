"""Weights files: written completely or not at all, identified by their SHA-256, found in folders."""

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ops.tool import replaced

from .errors import CheckpointError

SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".ckpt", ".pkl")


@contextmanager
def whole(path: Path, *, force: bool = False) -> Iterator[Path]:
    """As `ops.tool.replaced`, in a folder that is made if needed.

    Raises CheckpointError if `path` is no file, or a file and `force` is False, or if it cannot be written.
    """
    try:
        other = os.path.lexists(path) and not path.is_file()  # a folder, a pipe, a link to nothing
        if other or (path.is_file() and not force):
            raise CheckpointError(f"{path} already exists: give another name{'' if other else ', or --force'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors, readable to those to whom files are by the umask: safetensors' own are their owner's alone."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    save_file(dict(tensors), path, metadata=dict(metadata))
    if stat.S_IMODE(os.stat(path).st_mode) != mode:  # some file systems have no permissions
        os.chmod(path, mode)


def write_whole(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write what `save` writes into a file object. Raises OSError if the disk is full.

    It goes to memory first: where nothing can be written, torch's own writer raises RuntimeError, or ends the process.
    """
    buffer = io.BytesIO()
    save(buffer)
    path.write_bytes(buffer.getbuffer())


def sha256(path: Path) -> str:
    """Hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def weights_in(folder: Path) -> list[Path]:
    """The files in a folder with the ending of a weights file, not the hidden ones; of a run, its best checkpoint's.

    Raises OSError if it cannot be read.
    """
    return _weights(folder) or next(filter(None, map(_weights, checkpoints_in(folder, "best"))), [])


def checkpoints_in(run: Path, kind: str) -> list[Path]:
    """The checkpoints of a run of a kind, "best" or "step", newest first: two are "best" while one replaces the other.

    A user's own copy of one, such as best-before-tuning, is none. Raises OSError if their folder cannot be read.
    """
    own = re.compile(rf"{kind}-[0-9]{{8}}")
    return sorted((path for path in entries(run / "checkpoints") if own.fullmatch(path.name)), reverse=True)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where there is none. Raises OSError, unlike `glob`, if it cannot be looked at."""
    try:
        os.stat(os.path.join(folder, "."))  # where that fails, the names may be listed, but say nothing
        return list(folder.iterdir())
    except OSError as error:
        if is_absent(error):
            return []
        raise


def is_folder(path: str | Path) -> bool:
    """Whether a path leads to a folder. Raises OSError where that is unknown; Python 3.14's Path.is_dir is False."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: str | Path) -> bool:
    """Whether a path leads to a file; as `is_folder`."""
    return stat.S_ISREG(_mode(path))


def _mode(path: str | Path) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name that no path can have
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return 0


def is_absent(error: OSError) -> bool:
    """Whether a file or folder is not there, by the error at it, rather than there and not to be looked at.

    Of a link to nothing only the latter is known: it may lead to a disk that is not mounted.
    """
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return False
    if error.filename is None:  # a library's, which tells no more
        return True
    path = Path(os.fsdecode(error.filename))
    last = _last(path)
    return last != path and os.path.exists(last)


def unreadable(path: str | Path, error: OSError) -> str:
    """Says that a file or folder cannot be read, and why, by the error at it."""
    path = Path(os.fsdecode(path))
    if isinstance(error, PermissionError):
        return f"{path} is not readable by this user ({error.strerror})"
    last = _last(Path(os.fsdecode(error.filename or path)))
    if os.path.islink(last) and not os.path.exists(last):
        link = "it" if last == path else last
        return f"{path} cannot be read: {link} is a link to {os.path.realpath(last)}, which is not there"
    return f"{path} cannot be read: {error.strerror}"


def _last(path: Path) -> Path:
    """The last part of a path that is there, be it a link to nothing."""
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), path)


def _weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
