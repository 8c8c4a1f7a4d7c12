"""Files of weights: written whole or not at all, told apart by what is in them, found in folders."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".ckpt", ".pkl")


@contextmanager
def whole(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that gets its name when all went well, and is removed when it did not.

    Raises CheckpointError where there is a file already, unless `force`, and where the folder does not take one.
    """
    # no longer than the name of a file may be
    temporary = path.with_name(f".{path.stem[:40]}-{os.getpid()}{path.suffix}")
    try:
        if path.is_dir() or (path.exists() and not force):
            raise CheckpointError(
                f"{path} is there already: give another name{'' if path.is_dir() else ', or --force'}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
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
    """The files in a folder that their endings call weights; no hidden ones. OSError where it may not be read."""
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
