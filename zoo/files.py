"""Files that are written whole or not at all, and told apart by what is in them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError


@contextmanager
def whole(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that gets its name when all went well, and is removed when it did not.

    Raises CheckpointError where there is a file already, unless `force`, and where the folder does not take one.
    """
    if path.is_dir() or (path.exists() and not force):
        raise CheckpointError(f"{path} is there already: give another name{'' if path.is_dir() else ', or --force'}")
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
