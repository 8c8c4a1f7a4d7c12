"""Records that are image files, or hold the bytes of image files."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.data.images import Decoding, File, Jpeg, open_late, open_rgb, orientation_of


class Encoded(ABC):
    """What folders, tables and shards share: they say where an encoded image lies, and decode it by one rule."""

    labels: np.ndarray  # (N,) int64
    decoding = Decoding()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> File:
        """The image file, or a file object of its bytes; raises DataError where there is none."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What an error message calls the record."""

    def name_of(self, index: int) -> str:
        """The name of the image's file, as it was published."""
        return Path(self.where(index)).name

    @abstractmethod
    def stamp(self, index: int) -> str:
        """A text that changes when the image does: the path, the size and the time of the file that holds it."""

    def image(self, index: int) -> Image.Image:
        return open_rgb(self.encoded(index), self.where(index), self.decoding)

    def orientation(self, index: int) -> int:
        """What the EXIF tag of the file says, 1 where it says nothing."""
        return orientation_of(self.encoded(index), self.where(index))

    def late(self, index: int) -> Image.Image | Jpeg:
        """`image`, a colour JPEG undecoded."""
        return open_late(self.encoded(index), self.where(index), self.decoding)
