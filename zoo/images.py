"""Which kinds of image files are opened."""

from functools import cache

from PIL import Image

# no others: for some, EPS among them, Pillow starts another program
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow reads, for the `formats` of `Image.open`."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
