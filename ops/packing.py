"""Queries, keys and values as views of one packed projection, whose gradients are assembled without a copy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import unseen, watched


def unpack(packed: Tensor) -> list[Tensor]:
    """The n parts of a packed map: (B, H, W, n, heads, D) -> n views (B, H, W, heads, D), in order.

    The same as `packed.unbind(3)`, whose backward copies the gradients of the parts into one map. Where kernels run,
    window, neighborhood and channel attention write them into one map, which then is the gradient without a copy.
    Raises ValueError for another number of axes.
    """
    if packed.dim() != 6:
        raise ValueError(f"packed is {packed.shape}: expected (B, H, W, n, heads, D)")
    if torch.jit.is_scripting():
        return packed.unbind(3)
    else:
        learns = torch.is_grad_enabled() and packed.requires_grad
        return list(Unpack.apply(packed) if learns and unseen([packed]) else packed.unbind(3))


class Unpack(torch.autograd.Function):
    """`unbind(3)` whose backward recognises gradients that are already packed."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(3)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> Tensor:
        # a second derivative needs operators, and so does anything else that records them
        whole = None if torch.is_grad_enabled() or watched(*parts) else whole_of(parts)
        return torch.stack(parts, 3) if whole is None else whole


def whole_of(parts: Sequence[Tensor]) -> Tensor | None:
    """The packed map (B, H, W, n, heads, D) whose parts are these n tensors (B, H, W, heads, D), in order, or None."""
    first = parts[0]
    B, H, W, heads, D = first.shape
    strides = steps(first.shape, len(parts))
    for place, part in enumerate(parts):
        if part.shape != first.shape or part.dtype != first.dtype or part.stride() != strides[:3] + strides[4:]:
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        if part.storage_offset() != first.storage_offset() + place * strides[3]:
            return None
    return first.as_strided((B, H, W, len(parts), heads, D), strides)


def steps(part: torch.Size, count: int) -> tuple[int, ...]:
    """The strides of a contiguous packed map with `count` parts of shape (B, H, W, heads, D)."""
    _, H, W, heads, D = part
    token = count * heads * D
    return (H * W * token, W * token, token, heads * D, D, 1)


def apart(*parts: Tensor) -> tuple[list[Tensor], list[int]]:
    """Empty tensors like `parts` (B, H, W, heads, D), each contiguous, and the stride between tokens, in heads."""
    return [part.new_empty(part.shape) for part in parts], [part.shape[3] for part in parts]


def as_given(*parts: Tensor) -> tuple[list[Tensor], list[int]]:
    """Like `apart`, but if `parts`, or all but the first, are parts of one packed map, so are the tensors returned."""
    for first in range(len(parts) - 1):
        if whole_of(parts[first:]) is not None:
            made, pitches = apart(*parts[:first])
            B, H, W, heads, D = parts[first].shape
            count = len(parts) - first
            packed = parts[first].new_empty((B, H, W, count, heads, D))
            return [*made, *packed.unbind(3)], pitches + [count * heads] * count
    return apart(*parts)
