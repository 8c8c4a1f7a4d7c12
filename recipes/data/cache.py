"""A cache of decoded images in memory or on disk, so that each is decoded once.

One file holds a split: a table with a row per image, then the pixels, 8-bit RGB at full size, one image after the other
in the order they were first read. In memory it is an anonymous file shared by all workers of a process; on disk it is
reused by later runs and shared by all runs and ranks of the machine. An image that has changed (path, size or time, see
`Encoded.stamp`) is decoded and stored anew. Images that exceed the limit or do not fit on the disk are decoded every
time. A row is written after its pixels and holds their checksum, so that a kill leaves no partial image.
"""

import errno
import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.console import note
from recipes.data.encoded import Encoded
from recipes.data.errors import DataError
from recipes.data.files import HOMELESS, digest, sidecar
from recipes.data.images import orientation, tagged
from recipes.names import at_home

HEAD = struct.Struct("<8sQQ8x")  # magic with the version, rows, end of the stored pixels
ROW = struct.Struct("<8sQIIII")  # stamp, position, width, height, checksum, EXIF orientation once it is filled
MAGIC = b"RGBPIX01"


class Cache:
    """At most `limit` bytes of decoded images of `count` records; `path` None is memory, freed with the process.

    Raises DataError if the file cannot be made.
    """

    def __init__(self, count: int, limit: int, path: Path | None):
        self.count, self.limit, self.path, self.full = count, limit, path, False
        try:
            self.fd = self._anonymous() if path is None else self._open(path)
        except OSError as error:
            raise DataError(
                f"data.cache cannot use {path or 'memory'}: {error}; set another data.cache_dir="
            ) from error

    def image(self, records: Encoded, index: int) -> Image.Image:
        """`records.image(index)`, from the cache or decoded now."""
        stamp = hashlib.blake2b(records.stamp(index).encode(errors="surrogateescape"), digest_size=8).digest()
        kept = self._read(index, stamp)
        if kept is not None:
            return kept
        image = records.image(index)
        if not self.full:
            self._keep(index, stamp, image)
        return image

    def _read(self, index: int, stamp: bytes) -> Image.Image | None:
        found, position, width, height, checksum, turned = self._row(index)
        if not turned or found != stamp:
            return None
        pixels = os.pread(self.fd, 3 * width * height, position)
        if zlib.crc32(pixels) != checksum:  # power was lost before the pixels reached the disk
            return None
        return tagged(Image.frombytes("RGB", (width, height), pixels), turned)

    def _row(self, index: int) -> tuple[Any, ...]:
        return ROW.unpack(os.pread(self.fd, ROW.size, HEAD.size + index * ROW.size))

    def _keep(self, index: int, stamp: bytes, image: Image.Image) -> None:
        pixels = image.tobytes()
        try:
            position = self._reserve(len(pixels))
            if position is None:
                self._stop(f"it has reached the {self.limit / 1e9:g} GB of data.cache_gb")
                return
            self._write(pixels, position)
            row = ROW.pack(stamp, position, *image.size, zlib.crc32(pixels), orientation(image))
            self._write(row, HEAD.size + index * ROW.size)
        except OSError as error:
            self._stop(str(error))

    def _reserve(self, size: int) -> int | None:
        with _locked(self.fd):
            *_, end = HEAD.unpack(os.pread(self.fd, HEAD.size, 0))
            if end + size - self._table > self.limit:
                return None
            self._write(HEAD.pack(MAGIC, self.count, end + size), 0)
            return end

    def _write(self, data: bytes, position: int) -> None:
        """Write all of it, or raise OSError: of what a first write has no room for, the next one says why."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self.fd, rest, position)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rest, position = rest[written:], position + written

    def _stop(self, why: str) -> None:
        self.full = True
        note(f"the image cache ({self.path or 'memory'}) takes no more images: {why}")

    @property
    def _table(self) -> int:
        """Bytes before the first pixel."""
        return HEAD.size + self.count * ROW.size

    def _anonymous(self) -> int:
        if not hasattr(os, "memfd_create"):
            raise DataError("data.cache=ram needs Linux: set data.cache=disk")
        return self._blank(os.memfd_create("images"))

    def _blank(self, fd: int) -> int:
        os.ftruncate(fd, self._table)
        os.pwrite(fd, HEAD.pack(MAGIC, self.count, self._table), 0)
        return fd

    def _open(self, path: Path) -> int:
        """The file, made anew under the same name if its version or number of images differs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with ExitStack() as stack:
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # the umask says with whom it is shared
                stack.callback(os.close, fd)
                if self._prepared(fd, path):
                    stack.pop_all()
                    return fd

    def _prepared(self, fd: int, path: Path) -> bool:
        """Fill in a new file; False if it is outdated, and the path has to be opened again.

        Under a lock of the file itself, since others may have opened it at the same time. Unlike a link or a lock file,
        it works on file systems without hard links, and it is what `_reserve` needs in any case.
        """
        with _locked(fd):
            try:
                if not os.path.samestat(os.fstat(fd), path.stat()):  # another process has replaced it
                    return False
            except FileNotFoundError:
                return False
            head = os.pread(fd, HEAD.size, 0)
            if not head:
                self._blank(fd)
            elif len(head) < HEAD.size or HEAD.unpack(head)[:2] != (MAGIC, self.count):
                path.unlink()  # processes that have it open keep it
                return False
            return True

    def __getstate__(self) -> dict[str, Any]:
        # for workers that are not forked
        return self.__dict__ | {"fd": str(self.path or f"/proc/{os.getpid()}/fd/{self.fd}")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, fd=os.open(state["fd"], os.O_RDWR))

    def __del__(self) -> None:
        if isinstance(fd := getattr(self, "fd", None), int):
            os.close(fd)


@contextmanager
def _locked(fd: int) -> Iterator[None]:
    # a kernel lock of this process, which is released if the process is killed
    fcntl.lockf(fd, fcntl.LOCK_EX, HEAD.size)
    try:
        yield
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN, HEAD.size)


def cache_path(folder: str | None, *identity: object) -> Path:
    """The file on disk for the decoded images of what `identity` names: in `folder`, else in the user's cache.

    Raises DataError if that is below a home folder that this user does not have.
    """
    named = "\0".join(map(str, identity)), ".rgb"
    if not folder:
        kept = sidecar("images", *named)
        if kept is None:
            raise DataError(f"data.cache=disk has no folder: {HOMELESS}; or set data.cache_dir=")
        return kept
    try:
        return Path(at_home(folder), digest(*named))
    except OSError as error:
        raise DataError(f"data.cache cannot use data.cache_dir={folder}: {error}") from error
