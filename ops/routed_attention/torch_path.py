"""Routed attention in ordinary PyTorch operators, arranged for speed and for little memory.

Keys and values are copied once into regions, head by head. Those that some regions chose are gathered for a block of
these regions at a time, as many as fit a cache, and forgotten: the backward gathers them again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# bytes of a block: what the cache of a core holds; on other devices fewer and larger blocks are better
CACHED, SPACIOUS = 2**21, 2**28


def attend(q: Tensor, k: Tensor, v: Tensor, regions: tuple[int, int], route: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.routed_attention`."""
    H, W, heads, D = q.shape[1:]
    if route.shape[2] == regions[0] * regions[1]:  # plain attention: nothing to gather
        q, k, v = q.flatten(1, 2).transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).unflatten(1, [H, W])
    places = find(route, regions, heads)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what stands behind an `and`)
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return Gathered.apply(q, k, v, places, regions, scale)
    # a block has rows of regions of all images: how many blocks a graph has must not depend on the number of images
    step = fitting(2 * D * heads * route.shape[2] * H * W // regions[0] * q.element_size())
    q, k, v = spread(q, regions), matrices(spread(k, regions)).flatten(0, 1), matrices(spread(v, regions)).flatten(0, 1)
    parts = []
    for queries, chosen in zip(q.split(step, 1), places.split(step, 1)):  # noqa: B905 (TorchScript's has no strict)
        parts.append(attention(queries, k, v, chosen, scale))
    return torch.cat(parts, 1).flatten(3, 4).flatten(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, places: Tensor, scale: float) -> Tensor:
    """Of q, a block of `spread` (b, r, h, c, w, heads, D), to the matrices `places` of k and v; of its shape."""
    keys, values = pick(k, places), pick(v, places)
    return tiles(F.scaled_dot_product_attention(matrices(q), keys, values, scale=scale), q)


class Gathered(torch.autograd.Function):
    """`attention` on maps, block by block; its own backward is differentiable too."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, places: Tensor, regions: tuple[int, int], scale: float) -> Tensor:
        out = q.new_empty(q.shape)
        found, q = spread(out, regions), spread(q, regions)
        k, v = (matrices(spread(t, regions)).flatten(0, 1) for t in (k, v))
        for b, r, c in blocks(q, places):
            found[b, r, :, c] = attention(q[b, r, :, c], k, v, places[b, r, c], scale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.regions, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, k, v, places = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            q, k, v, grad = (spread(t.to(q.dtype), ctx.regions) for t in (q, k, v, grad))
            dq, dk, dv = gradients(q, matrices(k).flatten(0, 1), matrices(v).flatten(0, 1), grad, places, ctx.scale)
            found = (dq, tiles(dk, k), tiles(dv, v))
            return *(t.flatten(3, 4).flatten(1, 2) for t in found), None, None, None


def gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, places: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Those of q, k, v, in their shapes, from that of what `attention` gives for all of q."""
    dq, dk, dv = q.new_empty(q.shape), torch.zeros_like(k).flatten(1), torch.zeros_like(v).flatten(1)
    for b, r, c in blocks(q, places):
        chosen, queries, probe = places[b, r, c], matrices(q[b, r, :, c]) * scale, matrices(grad[b, r, :, c])
        keys = pick(k, chosen)
        weights = (queries @ keys.transpose(2, 3)).softmax(-1)  # (regions, heads, P, topk * P)
        slope = probe @ pick(v, chosen).transpose(2, 3)
        slope = (slope - (slope * weights).sum(-1, keepdim=True)) * weights
        dq[b, r, :, c] = tiles(slope @ keys * scale, q[b, r, :, c])
        dk.index_add_(0, chosen.flatten(), (slope.transpose(2, 3) @ queries).view(-1, dk.shape[1]))
        dv.index_add_(0, chosen.flatten(), (weights.transpose(2, 3) @ probe).view(-1, dv.shape[1]))
    return dq, dk.view(k.shape), dv.view(v.shape)


def blocks(q: Tensor, places: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Which images, rows and columns of regions make each block; q as `spread`, places as `find` gives them.

    A block holds its keys and values and, in the backward, logits.
    """
    B, rows, h, cols, w, heads, D = q.shape
    size = (2 * D + h * w) * heads * places.shape[4] * h * w * q.element_size()
    most = fitting(size, CACHED if q.is_cpu else SPACIOUS)
    steps = max(most // (rows * cols), 1), max(most // cols, 1), most
    for b in range(0, B, steps[0]):
        for r in range(0, rows, steps[1]):
            for c in range(0, cols, steps[2]):
                yield slice(b, b + steps[0]), slice(r, r + steps[1]), slice(c, c + steps[2])


def fitting(size: int, budget: int = 2**24) -> int:
    """How many of `size` bytes fit the budget, by default that of a block in a graph; at least one."""
    return max(budget // size, 1)


def find(route: Tensor, regions: tuple[int, int], heads: int) -> Tensor:
    """Region numbers (B, R, topk) -> (B, rows, cols, heads, topk): their places among all images, regions and heads."""
    B, R = route.shape[:2]
    image = torch.arange(B, device=route.device).view(B, 1, 1, 1) * R
    head = torch.arange(heads, device=route.device).view(heads, 1)
    return ((image + route.unsqueeze(2)) * heads + head).unflatten(1, [regions[0], regions[1]])


def pick(x: Tensor, places: Tensor) -> Tensor:
    """From (matrices, P, D) those at `places` (b, r, c, heads, topk): (b * r * c, heads, topk * P, D)."""
    heads, rows = places.shape[3], places.shape[4] * x.shape[1]
    return x.flatten(1).index_select(0, places.flatten()).view(-1, heads, rows, x.shape[2])


def spread(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """A view of (B, H, W, heads, D) as (B, rows, h, cols, w, heads, D), regions of h x w pixels."""
    return x.unflatten(2, [regions[1], -1]).unflatten(1, [regions[0], -1])


def matrices(x: Tensor) -> Tensor:
    """(b, r, h, c, w, heads, D) -> (b * r * c, heads, h * w, D): the pixels of each region, head by head."""
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


def tiles(x: Tensor, like: Tensor) -> Tensor:
    """The way back from `matrices`, to the shape of `like`."""
    b, r, h, c, w, heads, D = like.shape
    return x.view(b, r, c, heads, h, w, D).permute(0, 1, 4, 2, 5, 3, 6)
