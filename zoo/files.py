"""Weights files: written completely or not at all, identified by their SHA-256, found in folders."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".ckpt", ".pkl")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which is renamed to `path` on success and removed on failure."""
    # cut, since file names have a maximum length; a process on another machine may have the same number
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole(path: Path, *, force: bool = False) -> Iterator[Path]:
    """As `replaced`, in a folder that is made if needed.

    Raises CheckpointError if `path` is a folder, or a file and `force` is False, or if it cannot be written.
    """
    try:
        if path.is_dir() or (path.exists() and not force):
            raise CheckpointError(f"{path} already exists: give another name{'' if path.is_dir() else ', or --force'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


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
    places = [folder, *sorted(folder.glob(f"checkpoints/best-{8 * '[0-9]'}"))]
    return next(filter(None, map(_weights, places)), [])


def _weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
