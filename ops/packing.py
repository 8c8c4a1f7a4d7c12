"""Queries, keys and values of one projection: parts of one packed map, whose gradients need no copy to be one again."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import watched


def unpack(packed: Tensor) -> list[Tensor]:
    """The n parts of a packed map: (B, H, W, n, heads, D) -> n views (B, H, W, heads, D), in their order.

    The same as `packed.unbind(3)`, whose derivative copies the gradients of the parts into one map. Where kernels run,
    window, neighborhood and channel attention write them into one map, which then is the gradient as it lies.
    """
    if torch.jit.is_scripting():
        return packed.unbind(3)
    else:
        learns = torch.is_grad_enabled() and packed.requires_grad
        return list(Unpack.apply(packed) if learns and has_kernels(packed) else packed.unbind(3))


class Unpack(torch.autograd.Function):
    """`unbind(3)` whose derivative recognises gradients that lie packed."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(3)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> Tensor:
        # a second derivative follows operators, and so does whatever looks at them
        whole = None if torch.is_grad_enabled() or watched(*parts) else whole_of(parts)
        return torch.stack(parts, 3) if whole is None else whole


def has_kernels(x: Tensor) -> bool:
    """Whether kernels may run on `x` now, and nothing but autograd looks on."""
    return not watched(x) and (x.is_cuda or (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"))


def whole_of(parts: Sequence[Tensor]) -> Tensor | None:
    """The packed map (B, H, W, n, heads, D) of which n tensors (B, H, W, heads, D) are the parts, in order, or None."""
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
    """The strides of a contiguous packed map that has `count` parts of the shape (B, H, W, heads, D)."""
    _, H, W, heads, D = part
    token = count * heads * D
    return (H * W * token, W * token, token, heads * D, D, 1)


def apart(*parts: Tensor) -> tuple[list[Tensor], list[int]]:
    """Empty tensors like `parts` (B, H, W, heads, D), each contiguous, and how many heads lie from token to token."""
    return [part.new_empty(part.shape) for part in parts], [part.shape[3] for part in parts]


def as_given(*parts: Tensor) -> tuple[list[Tensor], list[int]]:
    """The same, but where `parts` are all parts of one packed map, or all but the first are, so is what is returned."""
    for first in range(len(parts) - 1):
        if whole_of(parts[first:]) is not None:
            made, pitches = apart(*parts[:first])
            B, H, W, heads, D = parts[first].shape
            count = len(parts) - first
            packed = parts[first].new_empty((B, H, W, count, heads, D))
            return [*made, *packed.unbind(3)], pitches + [count * heads] * count
    return apart(*parts)
