"""Opening images: whatever the file's colours, the result is 8-bit RGB."""

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from recipes.data.errors import DataError


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from grey, alpha (dropped), palette, CMYK or 16-bit grey (the high byte) images."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _from_wide_grey(image).convert("RGB")
    if image.mode in ("P", "PA", "LA") or "transparency" in image.info:
        # through RGBA: a palette's colours and its transparency are resolved before the alpha goes
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit greys to white at 255; keep their high byte instead."""
    values = np.asarray(image).astype(np.int64)
    if image.mode.startswith("I;16") or values.max(initial=0) > 255:
        values = values >> 8
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def open_rgb(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """The image in `file` as RGB; `name` is what an error calls it.

    Raises DataError if the file is missing, empty, truncated, or no image that Pillow knows.
    """
    try:
        with Image.open(file) as image:
            image.load()  # Pillow decodes late; after this block the file is closed
            return to_rgb(image)
    # Pillow's decoders raise a dozen types (OSError, SyntaxError, struct.error, DecompressionBombError, ...)
    except Exception as error:
        raise DataError(
            f"cannot read the image {name}: {type(error).__name__}: {error}. Replace or remove the file"
        ) from error
