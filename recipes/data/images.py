"""Open images of any colour mode as 8-bit RGB."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from recipes.data.errors import BadImage, DataError, Misread
from recipes.data.files import check_kind
from zoo.errors import printable
from zoo.images import formats, to_rgb

File = str | Path | IO[bytes]
LOSSY = ("JPEG", "MPO")  # formats of a single channel that change values; lossy WebPs have three
INVERTED = ("1;I", "L;I")  # formats of pixels in which 0 is white
SCALES = {"L;2": 85, "L;4": 17}  # factors by which Pillow multiplies such grey levels
AS_SHOWN = (
    "set data.exif_orientation=true to read images as viewers show them; without it they are read as they are stored, "
    "as timm and torchvision do"
)


@dataclass(frozen=True)
class Decoding:
    """How files become pixels.

    exif_orientation  rotate an image as its EXIF tag says; timm and torchvision do not
    max_pixels        width times height above which an image is refused before it is decoded
    """

    exif_orientation: bool = False
    max_pixels: int = 89_478_485


def open_rgb(file: File, name: str, decoding: Decoding = Decoding()) -> Image.Image:
    """The image in `file` as RGB; `name` is its name in errors.

    Raises DataError if the file cannot be read, and BadImage if it is empty, truncated, too large or not an image.
    """
    with _named(name), _opened(file, name, decoding) as image:
        return _pixels(image, decoding)


def _pixels(image: Image.Image, decoding: Decoding) -> Image.Image:
    """The RGB pixels of an open image, with its EXIF orientation unless that is applied."""
    image.load()  # Pillow decodes late, and the file will be closed
    if decoding.exif_orientation and orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    pixels = to_rgb(image)
    return pixels if pixels is image else tagged(pixels, orientation(image))


def open_labels(file: File, name: str, decoding: Decoding = Decoding()) -> np.ndarray:
    """(H, W) integers of a single-channel image, as they are in the file; for a palette, the indices.

    Pillow scales greys of less than eight bits and PGM's other maxima, and inverts files in which 0 is white (PBM, some
    TIFF); this is undone.

    Raises DataError if the file cannot be read, and BadImage if it is lossy, has several channels or is not an image.
    """
    with _named(name), _opened(file, name, decoding) as image:
        if image.format in LOSSY:
            raise BadImage(
                f"{name}: a mask has classes as integers, which {image.format} does not keep exactly",
                "Make the masks anew as single-channel PNGs whose values are classes: a conversion keeps the damage",
            )
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise BadImage(
                f"{name}: a mask has one channel of classes as integers, but this {image.format} is {image.mode}",
                "Save masks as single-channel PNGs whose values are classes, or, if only this one is wrong, set "
                "data.on_bad_image=replace",
            )
        raw, *rest = _pixels_in_file(image)
        labels = np.array(image)
        if labels.dtype == bool:  # of one bit a pixel
            labels = labels.astype(np.uint8)
        largest = 1 if image.mode == "1" else 65535 if image.mode.startswith("I") else 255
        if raw in INVERTED:
            labels = largest - labels
        if image.format == "PPM" and rest:
            return (labels.astype(np.int64) * int(rest[0]) + largest // 2) // largest
        scale = SCALES.get(raw, 1)
        return labels if scale == 1 else labels // scale


def _pixels_in_file(image: Image.Image) -> tuple[Any, ...]:
    """Pillow's name for the format of pixels in the file, which is lost once they are read, and for PGM the maximum."""
    args = image.tile[0].args if image.tile else None
    return args if isinstance(args, tuple) and args else (args,)


def orientation(image: "Image.Image | Jpeg") -> int:
    """The EXIF orientation, 1 ... 8; 1, upright, if there is none, it was applied, or it cannot be read."""
    header = image.header if isinstance(image, Jpeg) else image
    try:
        said = header.getexif().get(ExifTags.Base.Orientation, 1)
    # broken tags of a PNG or WebP raise SyntaxError, struct.error, ...; Pillow itself ignores those of a JPEG
    except Exception:
        return 1
    return int(said) if said in range(1, 9) else 1


def tagged(image: Image.Image, turned: int) -> Image.Image:
    """The image with this EXIF orientation, which conversions and caches of pixels lose."""
    if turned != 1:
        image.getexif()[ExifTags.Base.Orientation] = turned
    return image


def not_applied(turned: int, name: str, advice: str = AS_SHOWN) -> str:
    """A note on the image `name`, whose EXIF orientation is `turned`."""
    return f"{printable(name)} has the EXIF orientation {turned}, which is not applied: {advice}"


def orientation_of(file: File, name: str) -> int:
    """`orientation` of the image in `file`, of which only the header is read. Raises as open_rgb.

    1 for a TIFF: Pillow applies its tag whenever it decodes one.
    """
    with _named(name), _header(file) as image:
        return 1 if image.format == "TIFF" else orientation(image)


def open_late(file: File, name: str, decoding: Decoding) -> "Image.Image | Jpeg":
    """As open_rgb, but a colour JPEG stays undecoded, so that a crop of it can be decoded at a smaller size."""
    with _named(name):
        image = _opened(file, name, decoding)
        late = image.format in ("JPEG", "MPO") and image.mode == "RGB"
        if late and not (decoding.exif_orientation and orientation(image) != 1):
            return Jpeg(image, name)
        with image:
            return _pixels(image, decoding)


class Jpeg:
    """A JPEG of which only the header has been read. `size` is (width, height)."""

    def __init__(self, image: Image.Image, name: str):
        self.header, self.name, self.size = image, name, image.size

    def decode(self, factor: int = 1) -> Image.Image:
        """Its pixels at 1 / `factor` (1, 2, 4 or 8) of its size, rounded up: the decoder skips the fine DCT terms.

        Raises BadImage.
        """
        with _named(self.name), self.header as image:
            if factor > 1:
                image.draft("RGB", (self.size[0] // factor, self.size[1] // factor))
            image.load()
            return image


def _opened(file: File, name: str, decoding: Decoding) -> Image.Image:
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses images that are twice as large
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, decoding.max_pixels)
    try:
        image = _header(file)
    except Image.DecompressionBombError as error:
        raise Misread(
            f"cannot read the image {name}: {type(error).__name__}: {error}",
            "Set data.max_pixels= to its pixels or more to read it, or data.on_bad_image=replace",
        ) from error
    width, height = image.size
    if width * height > decoding.max_pixels:
        image.close()
        raise Misread(
            f"{name}: {width} x {height} pixels are more than data.max_pixels={decoding.max_pixels}",
            f"Set data.max_pixels={width * height} or more to read it, or data.on_bad_image=replace",
        )
    return image


def _header(file: File) -> Image.Image:
    if isinstance(file, (str, Path)):
        check_kind(file)
    return Image.open(file, formats=formats())


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    # Pillow's decoders raise a dozen types (OSError, SyntaxError, struct.error, DecompressionBombError, ...)
    except Exception as error:
        why = re.sub(r" <_io\.\w+ object at \w+>", "", str(error))  # what is read from memory has no other name
        said = f"cannot read the image {name}: {type(error).__name__}: {why}"
        if isinstance(error, OSError) and error.errno is not None:  # the system's: no file, no permission, a bad disk
            raise DataError(f"{said}. Is the folder still there?") from error
        raise BadImage(said) from error
