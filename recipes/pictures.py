"""Label maps, boxes and masks, drawn into their images."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ops.tool import replaced

SIDE = 320  # pixels of the long side of an image in a picture
LEGEND = 60  # classes that are named below a picture, at most
GAP = 4
TEXT = 12  # pixels of a line's height
LINE = TEXT + 6
Pair = tuple[Image.Image, Image.Image]


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with replaced(path) as temporary:
        image.save(temporary, format="PNG")


def colours(count: int) -> list[tuple[int, int, int]]:
    """A colour for each class; neighbours differ in hue by the golden ratio of the circle."""
    rgb = (colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 1 - 0.25 * (number % 3) / 2) for number in range(count))
    return [tuple(round(255 * part) for part in colour) for colour in rgb]


def with_labels(image: Image.Image, labels: Tensor, classes: int, *, bare: Sequence[int]) -> Image.Image:
    """The image with each pixel tinted by its class, (H, W) integers, except `bare` classes and unlabelled pixels."""
    tinted = (labels < classes) & ~torch.isin(labels, torch.tensor(list(bare), dtype=labels.dtype))
    tints = np.array(colours(classes), np.uint8)[labels.clamp(max=classes - 1).numpy()]  # (H, W, 3)
    shaded = Image.blend(image, Image.fromarray(tints), 0.65)
    return Image.composite(shaded, image, Image.fromarray(tinted.numpy()))


def with_objects(image: Image.Image, objects: dict[str, Any], names: Sequence[str]) -> Image.Image:
    """The image with boxes, classes, scores and, if there are any, masks, all of the image's size."""
    labels, pixels = objects["labels"].tolist(), F.pil_to_tensor(image)
    if not labels:
        return image
    tints = [colours(len(names))[label] for label in labels]
    if "masks" in objects:
        for mask, tint in zip(objects["masks"], tints, strict=True):  # drawn all at once, overlaps come out black
            pixels = draw_segmentation_masks(pixels, mask, alpha=0.5, colors=tint)
    size = max(TEXT, max(image.size) // 60)
    image = F.to_pil_image(draw_bounding_boxes(pixels, objects["boxes"], colors=tints, width=max(2, size // 6)))
    said = [names[label] for label in labels]
    if "scores" in objects:
        said = [f"{name}: {score:.2f}" for name, score in zip(said, objects["scores"].tolist(), strict=True)]
    for box, text, tint in zip(objects["boxes"].tolist(), said, tints, strict=True):
        _tag(image, box, text, tint, size)
    return image


def _tag(image: Image.Image, box: Sequence[float], text: str, tint: tuple[int, int, int], size: int) -> None:
    """Write a text into the upper left corner of a box, moved left if it would cross the right border."""
    draw = ImageDraw.Draw(image)
    width, height = draw.textlength(text, _font(size)) + 4, size + 4
    left, top = (max(0, min(start, most - side)) for start, most, side in zip(box, image.size, (width, height)))  # noqa: B905
    draw.rectangle((left, top, left + width, top + height), fill=tint)
    dark = tint[0] * 0.299 + tint[1] * 0.587 + tint[2] * 0.114 < 120  # https://www.w3.org/TR/AERT/#color-contrast
    draw.text((left + 2, top + height / 2), text, "white" if dark else "black", _font(size), anchor="lm")


def readable(image: Image.Image) -> Image.Image:
    """The image, enlarged if it is too small for text in it to be legible."""
    return image if max(image.size) >= SIDE else fitted(image)


def fitted(image: Image.Image) -> Image.Image:
    """The image at the size that it has in a picture of several."""
    scale = SIDE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def beside(pairs: Sequence[Pair], names: Sequence[str], shown: Collection[int]) -> Image.Image:
    """Pairs of ground truth and prediction, two pairs per row, above a legend of the classes that they show."""
    cells = [[fitted(image) for image in pair] for pair in pairs]
    width, height = (max(cell.size[axis] for pair in cells for cell in pair) + GAP for axis in (0, 1))
    width, height, columns = max(width, 5 * TEXT), height + LINE, min(2, len(cells))
    sheet = Image.new("RGB", (columns * (2 * width + 2 * GAP), -(-len(cells) // 2) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(cells):
        line, column = divmod(number, 2)
        for turn, (cell, head) in enumerate(zip(pair, ("true", "found"), strict=True)):
            left, top = (2 * column + turn) * width + 2 * column * GAP, line * height
            draw.text((left + GAP, top + LINE / 2), head, "black", _font(), anchor="lm")
            sheet.paste(cell, (left, top + LINE))
    return _above(sheet, _legend(sorted(shown), names, sheet.width))


def _above(top: Image.Image, bottom: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (top.width, top.height + bottom.height), "white")
    sheet.paste(top)
    sheet.paste(bottom, (0, top.height))
    return sheet


def _legend(classes: Sequence[int], names: Sequence[str], width: int) -> Image.Image:
    """A square in the colour of each class before its name, on as many lines as needed."""
    tints, left_out = colours(len(names)), len(classes) - LEGEND
    entries: list[tuple[Any, str]] = [(tints[number], names[number]) for number in classes[:LEGEND]]
    if left_out > 0:
        entries.append((None, f"and {left_out} more"))
    places, across, down = [], GAP, GAP
    for tint, name in entries:
        wide = TEXT + 4 + _font().getlength(name)
        if across > GAP and across + wide > width:
            across, down = GAP, down + LINE
        places.append((across, down, tint, name))
        across += round(wide) + TEXT
    legend = Image.new("RGB", (width, down + LINE), "white")
    draw = ImageDraw.Draw(legend)
    for left, top, tint, name in places:
        draw.rectangle((left, top, left + TEXT, top + TEXT), fill=tint)
        draw.text((left + TEXT + 4, top + TEXT / 2), name, "black", _font(), anchor="lm")
    return legend


@cache
def _font(size: int = TEXT) -> ImageFont.FreeTypeFont:
    """The font of the plots: without FreeType, Pillow's own has a single size and few letters."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
