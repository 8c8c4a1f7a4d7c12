"""Resizing of maps, with gradients of a fixed order where these are asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import ordered, wide, without_autocast


def bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`F.interpolate` with half-pixel centres, (B, C, H, W) -> (B, C, *size); by matmuls where deterministic algorithms
    forbid its backward, which uses atomics on GPUs.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if ordered(x):
            return by_matmuls(x, size)
    return F.interpolate(x, [size[0], size[1]], mode="bicubic", align_corners=False)


def by_matmuls(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The same, a matmul for each axis."""
    dtype = wide(x.dtype)
    rows, columns = (_weights(x.shape[2 + axis], size[axis], x.device, dtype) for axis in (0, 1))
    with without_autocast(x):
        return (rows @ x.to(dtype) @ columns.T).to(x.dtype)


def _weights(length: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What places of an axis of `length` weigh in each of `count`, (count, length)."""
    each = torch.eye(length, dtype=dtype, device=device)[None, None]
    return F.interpolate(each, [count, length], mode="bicubic", align_corners=False)[0, 0]
