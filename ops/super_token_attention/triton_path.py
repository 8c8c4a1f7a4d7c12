"""Super tokens with Triton: launches the kernels and registers them as torch operators."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import under_autocast, wide
from ..launching import launch, power_of_two
from ..precision import precision
from ..registration import register
from ..sizes import filled
from ..tiles import strides
from . import reference
from .kernels import collect_kernel, contribute_kernel, relate_kernel, spread_kernel

PIXELS, CHANNELS = 64, 64  # of a tile, at most
TOKENS = 16  # of a tile


def associate(x: Tensor, cell: tuple[int, int], iterations: int, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Tokens (B, h, w, C) and affinity (B, H, W, 9); the arguments are those of `ops.super_tokens`."""
    (x,) = under_autocast(x)
    fixed, sides = x if differentiable else x.detach(), list(cell)
    # the sum of a cell that extends beyond the map is divided by all its pixels
    maps = F.avg_pool2d(fixed.permute(0, 3, 1, 2), sides, sides, ceil_mode=True, divisor_override=cell[0] * cell[1])
    affinity = share(fixed, maps.permute(0, 2, 3, 1), sides)
    for _ in range(iterations - 1):
        affinity = share(fixed, average(fixed, affinity, sides, differentiable)[0], sides)
    return average(x, affinity, sides, differentiable)[0], affinity


def scatter(tokens: Tensor, affinity: Tensor, cell: tuple[int, int]) -> Tensor:
    """(B, H, W, C); the arguments are those of `ops.scatter_super_tokens`."""
    return distribute(*under_autocast(tokens, affinity), list(cell))


def relate(x: Tensor, tokens: Tensor, cell: list[int], scale: float, extra: Tensor | None, softmax: bool) -> Tensor:
    """(B, H, W, 9): scale * x . token + extra (B, h, w) for the nine tokens around each pixel, or their softmax."""
    B, H, W, C = x.shape
    h, w = tokens.shape[1:3]
    out, rows = x.new_empty((B, H, W, 9)), pixels(cell)
    given = (x, tokens, extra, out, *strides(x, tokens, out)[:2], C, H, W, h, w, scale)
    tiles = dict(BLOCK_P=rows, BLOCK_C=CHANNELS, PRECISION=precision(x.dtype))
    launch(relate_kernel, B * h * w * parts(cell), *given, CH=cell[0], CW=cell[1], SOFTMAX=softmax, **tiles)
    return out


def collect(x: Tensor, affinity: Tensor, cell: list[int], averaged: bool) -> tuple[Tensor, Tensor | None]:
    """(B, h, w, C): sums, or averages, of the pixels around each token; and the divisors of averages."""
    B, H, W, C = x.shape
    h, w = -(-H // cell[0]), -(-W // cell[1])
    sums = x.new_empty((B, h, w, 9, C), dtype=torch.float32)
    totals = x.new_empty((B, h, w, 9), dtype=torch.float32) if averaged else None
    given = (x, affinity, sums, totals, strides(x, affinity)[0], *affinity.stride(), C, H, W, h, w)
    tiles, blocks = dict(BLOCK_P=pixels(cell), BLOCK_C=CHANNELS, PRECISION=precision(x.dtype)), -(-C // CHANNELS)
    launch(contribute_kernel, B * h * w * blocks, *given, CH=cell[0], CW=cell[1], **tiles)
    out, count = x.new_empty((B, h, w, C)), B * h * w
    total = x.new_empty((B, h, w), dtype=torch.float32) if averaged else None
    programs = -(-count // TOKENS) * blocks
    launch(collect_kernel, programs, sums, totals, out, total, count, C, h, w, BLOCK_T=TOKENS, BLOCK_C=CHANNELS)
    return out, total


def spread(affinity: Tensor, tokens: Tensor, cell: list[int], scale: Tensor | None = None) -> Tensor:
    """(B, H, W, C): for each pixel, the sum of the nine tokens around it, weighted by affinity and scale (B, h, w)."""
    B, H, W, _ = affinity.shape
    h, w, C = tokens.shape[1:]
    out = tokens.new_empty((B, H, W, C))
    given = (affinity, tokens, scale, out, *affinity.stride(), strides(tokens, affinity, out)[0], C, H, W, h, w)
    tiles = dict(BLOCK_P=pixels(cell), BLOCK_C=CHANNELS, PRECISION=precision(tokens.dtype))
    programs = B * h * w * parts(cell) * -(-C // CHANNELS)
    launch(spread_kernel, programs, *given, CH=cell[0], CW=cell[1], **tiles)
    return out


def pixels(cell: list[int]) -> int:
    """Rows of a tile: the pixels of a cell, rounded up to a power of two that a matmul supports."""
    return min(max(power_of_two(cell[0] * cell[1]), 16), PIXELS)


def parts(cell: list[int]) -> int:
    return -(-cell[0] * cell[1] // pixels(cell))


def share_outputs(x: Tensor, tokens: Tensor, cell: list[int]) -> tuple[Tensor]:
    """The affinity (B, H, W, 9)."""
    return (x.new_empty((*x.shape[:3], 9)),)


def share_forward(x, tokens, cell):
    return (relate(x, tokens, cell, x.shape[3] ** -0.5, None, softmax=True),)


def share_backward(grad, x, tokens, cell, affinity):
    change = affinity.float() * (grad - (grad * affinity).sum(-1, keepdim=True, dtype=torch.float32))
    change = (change * x.shape[3] ** -0.5).to(x.dtype)
    return spread(change, tokens, cell), collect(x, change, cell, averaged=False)[0]


def share_specification(x, tokens, cell):
    affinity, _ = reference.compare(reference.cut(x, cell), tokens)
    return reference.join(affinity, cell)[:, : x.shape[1], : x.shape[2]]


def average_outputs(x: Tensor, affinity: Tensor, cell: list[int], learned: bool) -> tuple[Tensor, Tensor]:
    """Tokens (B, h, w, C), and their divisors (B, h, w)."""
    grid = (x.shape[0], -(-x.shape[1] // cell[0]), -(-x.shape[2] // cell[1]))
    return x.new_empty((*grid, x.shape[3])), x.new_empty(grid, dtype=torch.float32)


def average_forward(x, affinity, cell, learned):
    return collect(x, affinity, cell, averaged=True)


def average_backward(grad, x, affinity, cell, learned, tokens, total):
    divisor = total + 1e-12
    exact = grad / divisor[..., None]
    quotient = exact.to(x.dtype)
    if x.dtype == torch.float16:  # a small divisor's quotient may exceed its range: shares are up to 1
        change = spread(affinity, grad.contiguous(), cell, 1 / divisor)
    else:
        change = spread(affinity, quotient, cell)
    if not learned:
        return change, None
    extra = -(exact * tokens).sum(-1)  # a larger share of one pixel makes the others count less
    return change, relate(x, quotient, cell, 1.0, extra, softmax=False)


def average_specification(x, affinity, cell, learned):
    shares = reference.cut(filled(affinity, cell, 1 / 9), cell)
    total = reference.collect(shares.sum(3, dtype=wide(shares.dtype)).unsqueeze(-1))
    return reference.average(reference.cut(x, cell), shares, total)


def distribute_outputs(tokens: Tensor, affinity: Tensor, cell: list[int]) -> tuple[Tensor]:
    """Pixels (B, H, W, C)."""
    return (tokens.new_empty((*affinity.shape[:3], tokens.shape[3])),)


def distribute_forward(tokens, affinity, cell):
    return (spread(affinity, tokens, cell),)


def distribute_backward(grad, tokens, affinity, cell, out):
    return collect(grad, affinity, cell, averaged=False)[0], relate(grad, tokens, cell, 1.0, None, softmax=False)


share = register(
    "super_token_share",
    "Tensor x, Tensor tokens, int[] cell",
    outputs=share_outputs,
    forward=share_forward,
    backward=share_backward,
    specification=share_specification,
    results=1,
)
average = register(
    "super_token_average",
    "Tensor x, Tensor affinity, int[] cell, bool learned",
    outputs=average_outputs,
    forward=average_forward,
    backward=average_backward,
    specification=average_specification,
    reads_result=lambda x, affinity, cell, learned: learned,
)
distribute = register(
    "super_token_distribute",
    "Tensor tokens, Tensor affinity, int[] cell",
    outputs=distribute_outputs,
    forward=distribute_forward,
    backward=distribute_backward,
    specification=reference.scatter,
    results=1,
    reads_result=lambda *args: False,
)
