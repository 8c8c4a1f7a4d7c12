"""Label maps, boxes and masks drawn into the images that they belong to."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

SIDE = 320  # pixels of the long side of an image in a picture
LEGEND = 21  # classes that are named below a picture, at most
GAP = 4


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG that is whole or not there."""
    temporary = path.with_name(f".{path.name}")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def colours(count: int) -> list[tuple[int, int, int]]:
    """A colour for each class, those of neighbours far apart: hues a golden ratio of the circle from each other."""
    rgb = (colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 1 - 0.25 * (number % 3) / 2) for number in range(count))
    return [tuple(round(255 * part) for part in colour) for colour in rgb]


def with_labels(image: Image.Image, labels: Tensor, classes: int, *, bare: Sequence[int] = ()) -> Image.Image:
    """The image with each pixel tinted by its class, (H, W) integers; `bare` classes, and what has none, are not."""
    shown = [label for label in labels.unique().tolist() if label < classes and label not in bare]
    tints = colours(classes)
    masks = labels == torch.tensor(shown, dtype=labels.dtype)[:, None, None]  # (shown, H, W)
    pixels = F.pil_to_tensor(image)
    if shown:
        pixels = draw_segmentation_masks(pixels, masks, alpha=0.65, colors=[tints[label] for label in shown])
    return F.to_pil_image(pixels)


def with_objects(
    image: Image.Image, objects: dict[str, Any], names: Sequence[str], *, least: float = 0.0
) -> Image.Image:
    """The image with boxes, classes, scores and, where there are any, masks; without those that score below `least`."""
    enlarged = enlargement(image)
    image = image.resize([round(side * enlarged) for side in image.size], Image.Resampling.BICUBIC)
    scores = objects.get("scores")
    kept = torch.ones(len(objects["labels"]), dtype=torch.bool) if scores is None else scores >= least
    pixels, labels = F.pil_to_tensor(image), objects["labels"][kept].tolist()
    if not labels:
        return image
    tints = [colours(len(names))[label] for label in labels]
    if "masks" in objects:
        masks = F.resize(objects["masks"][kept].float(), list(image.size[::-1])) >= 0.5
        pixels = draw_segmentation_masks(pixels, masks, alpha=0.5, colors=tints)
    said = [names[label] for label in labels]
    if scores is not None:
        said = [f"{name} {score:.2f}" for name, score in zip(said, scores[kept].tolist(), strict=True)]
    boxes = objects["boxes"][kept] * enlarged
    # black on the class's colour: in the colour alone a word is lost on what it speaks of
    words = {"fill_labels": True, "label_background_colors": tints, "label_colors": "black"}
    return F.to_pil_image(draw_bounding_boxes(pixels, boxes, said, colors=tints, width=2, **words))


def enlargement(image: Image.Image) -> float:
    """By what a small image is enlarged so that what is written into it can be read."""
    return max(1.0, SIDE / max(image.size))


def beside(pairs: Sequence[tuple[Image.Image, Image.Image]], names: Sequence[str]) -> Image.Image:
    """Pairs of truth and finding, two pairs in a row, over the names of the classes in their colours."""
    cells = [[_fitted(image) for image in pair] for pair in pairs]
    width, height = (max(cell.size[axis] for pair in cells for cell in pair) + GAP for axis in (0, 1))
    lines = -(-len(cells) // 2)
    columns = 2 * min(2, len(cells))
    sheet = Image.new("RGB", (columns * width, lines * (height + 14) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(cells):
        line, column = divmod(number, 2)
        for turn, (cell, head) in enumerate(zip(pair, ("true", "found"), strict=True)):
            left, top = (2 * column + turn) * width, line * (height + 14)
            draw.text((left + GAP, top), head, fill="black")
            sheet.paste(cell, (left, top + 13))
    left = GAP
    for name, colour in list(zip(names, colours(len(names)), strict=True))[:LEGEND]:
        draw.text((left, sheet.height - 16), name, fill=colour)
        left += round(draw.textlength(name)) + 10
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
