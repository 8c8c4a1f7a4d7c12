"""Pastes masks of regions into the image."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def paste(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """(N, 1, m, m) probabilities inside (N, 4) boxes to (N, 1, height, width), 0 outside.

    Each is interpolated, bilinearly, at the centres of the image's pixels; torchvision rounds the boxes first.
    """
    out = masks.new_zeros(len(masks), 1, *size)
    for i, (mask, box) in enumerate(zip(masks, boxes.tolist(), strict=True)):
        rows, columns, part = within(mask, box, size)
        out[i, :, rows, columns] = part  # by index: with gradients on, parts of an unbound tensor cannot be set
    return out


def within(mask: Tensor, box: Sequence[float], size: Sequence[int]) -> tuple[slice, slice, Tensor]:
    """The rows and columns of an image that a box touches, and (1, rows, columns) probabilities there of (1, m, m)."""
    (left, right), (top, bottom) = _span(box[0], box[2], size[1]), _span(box[1], box[3], size[0])
    x = _places(left, right, box[0], box[2], mask)
    y = _places(top, bottom, box[1], box[3], mask)
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], 2)
    part = F.grid_sample(mask[None], grid[None], align_corners=False)[0]
    return slice(top, bottom), slice(left, right), part


def _span(start: float, end: float, side: int) -> tuple[int, int]:
    """The pixels that a box touches along a side; none if it lies beyond."""
    first = min(max(math.floor(start), 0), side)
    return first, max(min(math.ceil(end), side), first)


def _places(first: int, last: int, start: float, end: float, like: Tensor) -> Tensor:
    """Centres of the pixels `first` to `last` in coordinates that run from -1 to 1 across the box."""
    centres = torch.arange(first, last, dtype=like.dtype, device=like.device) + 0.5
    return (centres - start) / (end - start) * 2 - 1
