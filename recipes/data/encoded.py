"""Records that are image files, or contain the bytes of image files."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.data.files import stamp
from recipes.data.images import Decoding, File, Jpeg, open_late, open_rgb, orientation_of


class Encoded(ABC):
    """The base of folders, tables and shards: they locate encoded images, and decode them in the same way."""

    labels: np.ndarray  # (N,) int64
    decoding = Decoding()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> File:
        """The image file, or a file object of its bytes; raises DataError if there is none."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The name of the record in error messages."""

    def path_of(self, index: int) -> str:
        """The image's file, as it was published, or what `where` says; empty where a table names none."""
        return self.where(index)

    def name_of(self, index: int) -> str:
        """The name of that file."""
        return Path(self.path_of(index)).name

    @abstractmethod
    def stamp(self, index: int) -> str:
        """A string that changes when the image does: the path, size and times of its file."""

    def image(self, index: int) -> Image.Image:
        return open_rgb(self.encoded(index), self.where(index), self.decoding)

    def orientation(self, index: int) -> int:
        """The EXIF orientation of the file, 1 if it has none."""
        return orientation_of(self.encoded(index), self.where(index))

    def late(self, index: int) -> Image.Image | Jpeg:
        """As `image`, but a colour JPEG stays undecoded."""
        return open_late(self.encoded(index), self.where(index), self.decoding)


class Files(Encoded):
    """The base of records that are files of their own, whose paths `where` gives."""

    def encoded(self, index: int) -> str:
        return self.where(index)

    def stamp(self, index: int) -> str:
        return stamp(self.where(index))
