"""Which kinds of image files are opened, and what is RGB in those of other modes."""

from functools import cache

import numpy as np
from PIL import Image

# no others: for some, EPS among them, Pillow starts another program
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow reads, for the `formats` of `Image.open`."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from grey, palette, CMYK and wide images; transparent ones are composited on white.

    16-bit values are scaled (the high byte is kept), 32-bit greys by as many bytes as their largest value needs, floats
    of at most 1 by 255; what is infinite is white or black.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        return _from_wide_grey(image).convert("RGB")
    if image.mode in ("RGBA", "PA", "LA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """Pillow clips wide greys to white at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        largest = values.max(initial=0, where=np.isfinite(values))
        values = np.nan_to_num(values, posinf=255, neginf=0) * (255 if largest <= 1 else 1)
    else:
        wide = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
        largest = 0xFFFF if wide else int(values.max(initial=0))
        values = values.astype(np.int64) >> max(0, (largest.bit_length() + 7) // 8 - 1) * 8
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
