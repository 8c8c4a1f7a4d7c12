"""Super tokens in ordinary PyTorch operators, arranged for speed.

The map is copied once into cells. Each cell is then one matrix of pixels, multiplied by the nine tokens around it.
Only tensors with one entry per cell, not per pixel, are copied nine times.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import factor
from ..dispatch import differentiating, eager, under_autocast, wide
from ..sizes import ceil, cropped, filled, laid_out


def associate(x: Tensor, cell: tuple[int, int], iterations: int, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Tokens (B, h, w, C) and affinity (B, H, W, 9); the arguments are those of `ops.super_tokens`."""
    if not torch.jit.is_scripting():
        (x,) = under_autocast(x)
    B, H, W, C = x.shape
    h, w = ceil(H, cell[0]), ceil(W, cell[1])
    pixels = cut(x, cell)  # (cells, P, C)
    fixed = pixels if differentiable else pixels.detach()
    affinity = share(fixed, fixed.mean(1).view(B, h, w, C))  # (cells, 9, P)
    for _ in range(iterations - 1):
        affinity = share(fixed, average(fixed, affinity, B, h, w))
    return average(pixels, affinity, B, h, w), join(affinity.transpose(1, 2), H, W, cell)


def share(pixels: Tensor, tokens: Tensor) -> Tensor:
    """How each pixel (cells, P, C) is shared among the tokens (B, h, w, C) around it: (cells, 9, P)."""
    # tokens first: matmuls with nine columns are slow
    logits = torch.bmm(around(tokens * factor(None, pixels.shape[2])), pixels.transpose(1, 2))
    return logits.softmax(1).to(pixels.dtype)


def average(pixels: Tensor, affinity: Tensor, B: int, h: int, w: int) -> Tensor:
    """(B, h, w, C): the mean of the pixels around each token, weighted by their affinity to it."""
    if pixels.dtype == torch.float16:  # a gradient divided by a small total may exceed its range: shares are up to 1
        shares = (affinity * around(1 / totals(affinity, B, h, w))).to(pixels.dtype)
        return collect(torch.bmm(shares, pixels).view(B, h, w, 9, pixels.shape[2]))
    parts = torch.bmm(affinity, pixels).view(B, h, w, 9, pixels.shape[2])
    return (collect(parts) / totals(affinity, B, h, w)).to(pixels.dtype)


def totals(affinity: Tensor, B: int, h: int, w: int) -> Tensor:
    """(B, h, w, 1): the sum of the affinities to each token, and 1e-12, which in float16 would be 0."""
    return collect(affinity.sum(2, dtype=wide(affinity.dtype)).view(B, h, w, 9, 1)) + 1e-12


def scatter(tokens: Tensor, affinity: Tensor, cell: tuple[int, int]) -> Tensor:
    """(B, H, W, C); the arguments are those of `ops.scatter_super_tokens`."""
    out = torch.bmm(cut(affinity, cell), around(tokens))  # (cells, P, C)
    return join(out, affinity.shape[1], affinity.shape[2], cell)


def around(tokens: Tensor) -> Tensor:
    """(B, h, w, C) -> (cells, 9, C): the 3 x 3 tokens around each cell, zeros beyond the grid."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if eager(tokens) and not (tokens.requires_grad and differentiating()):
            # one copy of overlapping views, which has no fast gradient
            views = F.pad(tokens, [0, 0, 1, 1, 1, 1]).unfold(1, 3, 1).unfold(2, 3, 1)  # (B, h, w, C, 3, 3)
            return views.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2)
    return torch.stack([shift(tokens, m // 3 - 1, m % 3 - 1) for m in range(9)], 3).flatten(0, 2)


def collect(parts: Tensor) -> Tensor:
    """(B, h, w, 9, C) -> (B, h, w, C): for each token, the sum of its parts in the 3 x 3 cells around it."""
    # unbind, because the gradients of nine slices would be nine tensors of the full size
    each = parts.unbind(3)
    out = each[4]
    for m in range(9):
        if m != 4:
            # part m of a cell belongs to its neighbor m, so a token's own parts are at the mirrored positions
            out = out + shift(each[m], 1 - m // 3, 1 - m % 3)
    return out


def shift(x: Tensor, down: int, right: int) -> Tensor:
    """(B, h, w, C): at each position the entry `down` and `right` of it, zeros beyond the grid."""
    return F.pad(x, [0, 0, -right, right, -down, down])


def cut(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (cells, pixels of a cell, C), padded with zeros to whole cells."""
    B, H, W, C = x.shape
    x = filled(x, cell).reshape(B, ceil(H, cell[0]), cell[0], ceil(W, cell[1]), cell[1], C).transpose(2, 3)
    return laid_out(x).reshape(-1, cell[0] * cell[1], C)


def join(x: Tensor, H: int, W: int, cell: tuple[int, int]) -> Tensor:
    """The inverse of `cut`, cropped: (cells, P, C) -> (B, H, W, C)."""
    h, w = ceil(H, cell[0]), ceil(W, cell[1])
    x = x.unflatten(1, [cell[0], cell[1]]).unflatten(0, [-1, h, w]).transpose(2, 3)  # (B, h, cell, w, cell, C)
    return cropped(laid_out(x).flatten(3, 4).flatten(1, 2), H, W)
