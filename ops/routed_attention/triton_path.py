"""Routed attention with Triton: launches the kernels and registers them as a torch operator."""

import torch
from torch import Tensor

from ..dispatch import under_autocast
from ..launching import launch, power_of_two
from ..precision import precision
from ..registration import register
from ..tiles import outputs, strides
from . import reference
from .kernels import backward_keys_kernel, backward_queries_kernel, forward_kernel

TILE = 64  # lanes of queries in one matmul, at most, and usually of keys


def attend(q: Tensor, k: Tensor, v: Tensor, regions: tuple[int, int], route: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.routed_attention`."""
    return operator(*under_autocast(q, k, v), route, list(regions), scale)[0]


def forward(q, k, v, route, regions, scale):
    out, lse = outputs(q, k, v)
    programs, sizes, tiles = plan(k, regions, route)
    last = (*sizes, scale)
    launch(forward_kernel, programs, q, k, v, route.contiguous(), out, lse, *strides(q, k, v), *last, **tiles)
    return out, lse


def backward(grad, q, k, v, route, regions, scale, out, lse):
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)
    programs, sizes, tiles = plan(k, regions, route)
    last = (*strides(q, k, v, grad), *sizes, scale)
    given = (route.contiguous(), grad, out, lse, dq, delta)
    launch(backward_queries_kernel, programs, q, k, v, *given, *last, **tiles)
    launch(backward_keys_kernel, programs, q, k, v, *readers(route), grad, lse, delta, dk, dv, *last, **tiles)
    return dq, dk, dv, None


def plan(k: Tensor, regions: list[int], route: Tensor) -> tuple[int, tuple, dict]:
    """The number of programs, the size arguments of the kernels, and their tiles."""
    B, H, W, heads, D = k.shape
    rows, columns = regions
    height, width = H // rows, W // columns
    lanes = min(max(power_of_two(height * width), 16), TILE)
    parts = -(-height * width // lanes)
    sizes = (rows * columns, parts, route.shape[2], heads, H, W, columns, height, width)
    channels = max(power_of_two(D), 16)
    # with two warps 32 by 64 needs more registers than the compiler gives them; if a region has more pixels than a
    # tile, matmuls with twice as many keys took a tenth less time on an H200
    keys = 32 if lanes == 32 else TILE
    if height * width > TILE and k.element_size() == 2 and channels <= 64:
        keys = 2 * TILE
    tiles = dict(D=D, BLOCK_M=lanes, BLOCK_N=keys, BLOCK_D=channels, PRECISION=precision(k.dtype))
    return B * rows * columns * parts * heads, sizes, tiles


def readers(route: Tensor) -> tuple[Tensor, Tensor]:
    """For each region the regions that attend to it: concatenated lists (B, R * topk), and where each list begins.

    This is the inverse of route (B, R, topk), which lists for each region those that it attends to.
    """
    B, R, topk = route.shape
    # the kernel reads the lists as contiguous, and a sort keeps the strides of what it is given
    chosen, order = route.contiguous().flatten(1).sort(dim=1, stable=True)
    marks = torch.arange(R + 1, device=route.device).expand(B, -1).contiguous()
    return order // topk, torch.searchsorted(chosen, marks)


operator = register(
    "routed_attention",
    "Tensor q, Tensor k, Tensor v, Tensor route, int[] regions, float scale",
    outputs=outputs,
    forward=forward,
    backward=backward,
    specification=lambda q, k, v, route, regions, scale: reference.attend(q, k, v, tuple(regions), route, scale),
)
