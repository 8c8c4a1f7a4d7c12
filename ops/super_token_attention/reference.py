"""The specification of super tokens: the sparse association in both directions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import factor
from ..dispatch import wide
from ..sizes import filled


def associate(x: Tensor, cell: tuple[int, int], iterations: int, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Tokens (B, h, w, C) and affinity (B, H, W, 9); the arguments are those of `ops.super_tokens`."""
    H, W = x.shape[1], x.shape[2]
    pixels = cut(x, cell)  # (B, h, w, P, C)
    fixed = pixels if differentiable else pixels.detach()
    affinity, total = compare(fixed, fixed.mean(3))
    for _ in range(iterations - 1):
        affinity, total = compare(fixed, average(fixed, affinity, total))
    return average(pixels, affinity, total), join(affinity, cell)[:, :H, :W]


def compare(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Affinity (B, h, w, P, 9) of pixels to the tokens around them, and its sum for each token (B, h, w, 1)."""
    logits = torch.einsum("byxpc, byxmc -> byxpm", pixels, around(tokens)) * factor(None, pixels.shape[-1])
    affinity = logits.softmax(-1)
    return affinity, collect(affinity.sum(3, dtype=wide(affinity.dtype)).unsqueeze(-1))


def average(pixels: Tensor, affinity: Tensor, total: Tensor) -> Tensor:
    """(B, h, w, C): the mean of the pixels around each token, weighted by their affinity to it."""
    if affinity.dtype == torch.float16:  # a gradient divided by a small total may exceed its range: shares are up to 1
        shares = (affinity * around(1 / (total + 1e-12)).transpose(3, 4)).to(affinity.dtype)
        return collect(torch.einsum("byxpm, byxpc -> byxmc", shares, pixels))
    parts = collect(torch.einsum("byxpm, byxpc -> byxmc", affinity, pixels))
    return (parts / (total + 1e-12)).to(parts.dtype)


def scatter(tokens: Tensor, affinity: Tensor, cell: tuple[int, int]) -> Tensor:
    """(B, H, W, C); the arguments are those of `ops.scatter_super_tokens`."""
    out = torch.einsum("byxpm, byxmc -> byxpc", cut(affinity, cell), around(tokens))
    return join(out, cell)[:, : affinity.shape[1], : affinity.shape[2]]


def around(tokens: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, h, w, 9, C): the 3 x 3 tokens around each, zeros beyond the grid."""
    h, w = tokens.shape[1], tokens.shape[2]
    padded = F.pad(tokens, [0, 0, 1, 1, 1, 1])
    return torch.stack([padded[:, m // 3 : m // 3 + h, m % 3 : m % 3 + w] for m in range(9)], 3)


def collect(parts: Tensor) -> Tensor:
    """(B, h, w, 9, C) -> (B, h, w, C): for each token, the sum of its parts in the 3 x 3 cells around it."""
    h, w = parts.shape[1], parts.shape[2]
    # part m of a cell belongs to its neighbor m, so a token's own parts are at the mirrored positions
    padded = F.pad(parts, [0, 0, 0, 0, 1, 1, 1, 1])
    mirrored = [padded[:, 2 - m // 3 : 2 - m // 3 + h, 2 - m % 3 : 2 - m % 3 + w, m] for m in range(9)]
    return torch.stack(mirrored).sum(0)


def cut(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, h, w, pixels of a cell, C), padded with zeros to whole cells."""
    B, H, W, C = x.shape
    h, w = -(-H // cell[0]), -(-W // cell[1])
    x = filled(x, cell).view(B, h, cell[0], w, cell[1], C)
    return x.transpose(2, 3).reshape(B, h, w, cell[0] * cell[1], C)


def join(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """The inverse of `cut`, without cropping."""
    B, h, w, _, C = x.shape
    x = x.unflatten(3, [cell[0], cell[1]]).transpose(2, 3)  # (B, h, cell, w, cell, C)
    return x.reshape(B, h * cell[0], w * cell[1], C)
