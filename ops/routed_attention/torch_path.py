"""Routed attention in ordinary PyTorch operators, arranged for speed and low memory use.

Keys and values of a few images at a time are copied once into regions, head by head. They are then gathered for a block
of regions, as many as fit into the cache, and not kept: the backward gathers them again. If all fit, on a CPU, they are
gathered at once for PyTorch's fused attention, and kept. They are kept too if each region is routed to a single one.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..dispatch import eager, learning, refuse_batched, under_autocast, without_autocast
from ..partition import matmul_keys, sdpa
from ..sizes import laid_out, surely, varies
from .reference import cut, join

# bytes of a block: what CPU caches hold; on other devices fewer, larger blocks are better
CACHED, SPACIOUS = 2**23, 2**28
FEW = 64  # keys up to which two matmuls may be faster on CPUs than fused attention


def attend(q: Tensor, k: Tensor, v: Tensor, regions: tuple[int, int], route: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.routed_attention`."""
    H, W, heads, D = q.shape[1:]
    if not torch.jit.is_scripting():
        if few(q, k, v, regions, route):
            return at_once(q, k, v, regions, route, scale)
        q, k, v = under_autocast(q, k, v)
    if surely(route.shape[2] == regions[0] * regions[1]):  # plain attention: nothing to gather
        q, k, v = q.flatten(1, 2).transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
        return sdpa(q, k, v, None, scale).transpose(1, 2).unflatten(1, [H, W])
    if not torch.jit.is_scripting():
        # with topk 1 the gathered keys are no larger than the map: they are kept and not gathered again
        kept = learning(q, k, v, None) and route.shape[2] == 1
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not recorded and not kept:
            return Gathered.apply(q, k, v, route, regions, scale)
    places = find(route, regions, heads)
    # a block is a number of rows of regions of all images: the number of blocks in a graph must not depend on the
    # number of images, nor on the size of the map if it is symbolic; each row of regions is a block then
    size = 2 * D * heads * route.shape[2] * H * W // regions[0] * q.element_size()
    step = 1 if varies(size) else fitting(size)
    q, k, v = spread(q, regions), matrices(spread(k, regions)).flatten(0, 1), matrices(spread(v, regions)).flatten(0, 1)
    parts = []
    for queries, chosen in zip(q.split(step, 1), places.split(step, 1)):  # noqa: B905 (TorchScript's has no strict)
        parts.append(attention(queries, k, v, chosen, scale))
    return laid_out(torch.cat(parts, 1)).flatten(3, 4).flatten(1, 2)


def few(q: Tensor, k: Tensor, v: Tensor, regions: tuple[int, int], route: Tensor) -> bool:
    """Whether operators run eagerly on a CPU and the keys of all regions fit into one block."""
    if not eager(q) or route.shape[0] * route.shape[1] * gathered(q, regions, route) > CACHED:
        return False
    # fused attention's gradients are slow in half precision
    return route.shape[1] > route.shape[2] and (q.element_size() > 2 or not learning(q, k, v, None))


def at_once(q: Tensor, k: Tensor, v: Tensor, regions: tuple[int, int], route: Tensor, scale: float) -> Tensor:
    """The same for `few` keys, in few operators: calling these takes most of the time then."""
    B, H, W, heads, D = q.shape
    R, topk = route.shape[1:]
    pixels = H * W // R
    places = route if B == 1 else route + torch.arange(0, B * R, R, device=q.device).view(B, 1, 1)
    places = places.flatten()
    q, k, v = cut(q, regions), cut(k, regions), cut(v, regions)  # (B, R, pixels, heads, D)
    k, v = (t.reshape(B * R, pixels * heads * D).index_select(0, places) for t in (k, v))
    q = q.reshape(B * R, pixels, heads, D).transpose(1, 2)
    k, v = (t.view(B * R, topk * pixels, heads, D).transpose(1, 2) for t in (k, v))
    out = sdpa(q, k, v, None, scale).transpose(1, 2)  # (B * R, pixels, heads, D)
    return join(out.unflatten(0, [B, R]), regions, H, W)


def attention(q: Tensor, k: Tensor, v: Tensor, places: Tensor, scale: float) -> Tensor:
    """Attention of q, a block of `spread` (b, r, h, c, w, heads, D), to the matrices `places` of k and v; like q."""
    queries, keys, values = matrices(q), pick(k, places), pick(v, places)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if q.is_cpu and surely(keys.shape[2] <= FEW) and multiplied(queries, keys, values):
            return restored((queries * scale @ keys.transpose(2, 3)).softmax(-1) @ values, q)
    return restored(sdpa(queries, keys, values, None, scale), q)


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether two matmuls are faster on a CPU than fused attention to few keys (b, heads, N, D), N up to FEW."""
    return not eager(q) or learning(q, k, v, None) or k.shape[2] <= matmul_keys(k)


class Gathered(torch.autograd.Function):
    """`attention` on maps, block by block; its backward is differentiable too."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, route: Tensor, regions: tuple[int, int], scale: float) -> Tensor:
        out = q.new_empty(q.shape)
        for b, rows, cols in blocks(q, regions, route):
            places = find(route[b], regions, q.shape[3])
            queries, found, *keys = (spread(t[b], regions) for t in (q, out, k, v))
            keys, values = (matrices(t).flatten(0, 1) for t in keys)
            for r, c in product(rows, cols):
                found[:, r, :, c] = attention(queries[:, r, :, c], keys, values, places[:, r, c], scale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.regions, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        refuse_batched(grad, "routed_attention at this size")
        q, k, v, route = ctx.saved_tensors
        with without_autocast(q):
            q, k, v, grad = (t.to(q.dtype) for t in (q, k, v, grad))
            dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
            for b, rows, cols in blocks(q, ctx.regions, route):
                places = find(route[b], ctx.regions, q.shape[3])
                maps = [spread(t[b], ctx.regions) for t in (q, k, v, grad, dq, dk, dv)]
                gradients(*maps, places, list(product(rows, cols)), ctx.scale)
            return dq, dk, dv, None, None, None


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    places: Tensor,
    parts: list[tuple[slice, slice]],
    scale: float,
) -> None:
    """Fills dq, dk and dv from `grad`, the gradient of the result of `attention`; all as `spread`, for whole images."""
    keys, values = matrices(k).flatten(0, 1), matrices(v).flatten(0, 1)
    to_keys, to_values = torch.zeros_like(keys).flatten(1), torch.zeros_like(values).flatten(1)
    for r, c in parts:
        chosen, queries, probe = places[:, r, c], matrices(q[:, r, :, c]) * scale, matrices(grad[:, r, :, c])
        picked = pick(keys, chosen)
        weights = (queries @ picked.transpose(2, 3)).softmax(-1)  # (regions, heads, P, topk * P)
        slope = probe @ pick(values, chosen).transpose(2, 3)
        slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
        dq[:, r, :, c] = restored(slope @ picked, q[:, r, :, c]) * scale
        to_keys.index_add_(0, chosen.flatten(), (slope.transpose(2, 3) @ queries).view(-1, to_keys.shape[1]))
        to_values.index_add_(0, chosen.flatten(), (weights.transpose(2, 3) @ probe).view(-1, to_values.shape[1]))
    dk.copy_(restored(to_keys.view(keys.shape), k))
    dv.copy_(restored(to_values.view(values.shape), v))


def blocks(
    q: Tensor, regions: tuple[int, int], route: Tensor
) -> Iterator[tuple[slice, Sequence[slice], Sequence[slice]]]:
    """The images of each group, and the rows and columns of regions of each of its blocks."""
    rows, cols = regions
    most = fitting(gathered(q, regions, route), CACHED if q.is_cpu else SPACIOUS)
    for images in slices(q.shape[0], max(most // (rows * cols), 1)):
        yield images, slices(rows, max(most // cols, 1)), slices(cols, most)


def gathered(q: Tensor, regions: tuple[int, int], route: Tensor) -> int:
    """Bytes of a region in a block: its keys and values and, in the backward, its logits."""
    pixels = (q.shape[1] // regions[0]) * (q.shape[2] // regions[1])
    return (2 * q.shape[4] + pixels) * q.shape[3] * route.shape[2] * pixels * q.element_size()


def slices(count: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, count, step)]


def fitting(size: int, budget: int = 2**24) -> int:
    """How many items of `size` bytes fit the budget, by default that of a block in a graph; at least one."""
    return max(budget // size, 1)


def find(route: Tensor, regions: tuple[int, int], heads: int) -> Tensor:
    """Region indices (B, R, topk) -> (B, rows, cols, heads, topk): indices over all images, regions and heads."""
    B, R = route.shape[:2]
    image = torch.arange(B, device=route.device).view(B, 1, 1, 1) * R
    head = torch.arange(heads, device=route.device).view(heads, 1)
    return ((image + route.unsqueeze(2)) * heads + head).unflatten(1, [regions[0], regions[1]])


def pick(x: Tensor, places: Tensor) -> Tensor:
    """The entries of (matrices, P, D) at `places` (b, r, c, heads, topk): (b * r * c, heads, topk * P, D)."""
    heads, rows = places.shape[3], places.shape[4] * x.shape[1]
    return x.flatten(1).index_select(0, places.flatten()).view(-1, heads, rows, x.shape[2])


def spread(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """A view of (B, H, W, heads, D) as (B, rows, h, cols, w, heads, D), regions of h x w pixels."""
    return x.unflatten(2, [regions[1], -1]).unflatten(1, [regions[0], -1])


def matrices(x: Tensor) -> Tensor:
    """(b, r, h, c, w, heads, D) -> (b * r * c, heads, h * w, D): the pixels of each region, head by head."""
    return laid_out(x.permute(0, 1, 3, 5, 2, 4, 6)).flatten(4, 5).flatten(0, 2)


def restored(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `matrices`, to the shape of `like`."""
    b, r, h, c, w, heads, D = like.shape
    return x.view(b, r, c, heads, h, w, D).permute(0, 1, 4, 2, 5, 3, 6)
