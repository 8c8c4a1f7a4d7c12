"""Routed attention as Triton kernels: keys are read in place, through the lists of regions that are attended to.

The keys of all chosen regions form one sequence of lanes. So do the queries that chose a region, which the gradient of
its keys needs; they are listed beforehand. No two programs write to the same location.
"""

import triton
from triton import language as tl

from ..launching import FEW, PAIR, tuned, unlimited
from ..tiles import LOG2E, at, load_stored, load_tokens, offset, store_tokens, wide

# arguments that change with the map
SIZES = ("regions", "parts", "topk", "heads", "H", "W", "columns", "height", "width")


@triton.jit
def listed(Regions, start, lane, count, sizes):
    """Rows and columns of lanes in the `count` regions that are listed from `start` on, and whether they are pixels."""
    _, _, _, columns, height, width = sizes
    known = lane < count * height * width
    # in 32 bits: a 64-bit division calls a subroutine
    region = tl.load(Regions + start + lane // (height * width), mask=known, other=0).to(tl.int32)
    pixel = lane % (height * width)
    return region // columns * height + pixel // width, region % columns * width + pixel % width, known


@triton.jit
def own(regions, parts, sizes, BLOCK: tl.constexpr):
    """A program's image, head and region, rows and columns of the lanes of its tile, and whether they are pixels."""
    heads, _, _, columns, height, width = sizes
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    part, rest = rest % parts, rest // parts
    region, image = rest % regions, rest // regions
    lane = part * BLOCK + tl.arange(0, BLOCK)
    y, x = region // columns * height + lane // width, region % columns * width + lane % width
    return image, head, region, y, x, lane < height * width


@triton.jit
def number(image, y, x, sizes, strides):
    """Each pixel: the number of pixels in all images before its own, and its index within its image."""
    return image.to(tl.int64) * sizes[1] * sizes[2], wide(y, strides[5]) * sizes[2] + x


@tuned(SIZES, FEW)
def forward_kernel(
    Q, K, V, Route, Out, Lse, strides_q, strides_k, strides_v,
    regions, parts, topk, heads, H, W, columns, height, width, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one region and head, with an online softmax over the keys of the regions it attends to."""
    sizes = heads, H, W, columns, height, width
    image, head, region, y, x, inside = own(regions, parts, sizes, BLOCK_M)
    q = load_tokens(Q, offset(strides_q, image, head, y, x), strides_q, inside, D, BLOCK_D)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    routes = (image.to(tl.int64) * regions + region) * topk
    for start in range(0, topk * height * width, BLOCK_N):
        ky, kx, known = listed(Route, routes, start + tl.arange(0, BLOCK_N), topk, sizes)
        k = load_tokens(K, offset(strides_k, image, head, ky, kx), strides_k, known, D, BLOCK_D)
        v = load_tokens(V, offset(strides_v, image, head, ky, kx), strides_v, known, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where(known[None, :], logits, float("-inf"))
        new = tl.maximum(best, tl.max(logits, 1))  # finite: the first lane of every tile is a key
        p, shrink = tl.exp2(logits - new[:, None]), tl.exp2(best - new)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = new
    token = number(image, y, x, sizes, strides_q)
    store_tokens(Out, token, head, heads, inside, out / total[:, None], D, BLOCK_D)
    tl.store(at(Lse, token, head, heads), best + tl.log2(total), mask=inside)


@tuned(SIZES, unlimited(FEW))
def backward_queries_kernel(
    Q, K, V, Route, Grad, Out, Lse, DQ, Delta, strides_q, strides_k, strides_v, strides_g,
    regions, parts, topk, heads, H, W, columns, height, width, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and the delta that the softmax subtracts from the gradients of their logits."""
    sizes = heads, H, W, columns, height, width
    image, head, region, y, x, inside = own(regions, parts, sizes, BLOCK_M)
    token = number(image, y, x, sizes, strides_q)
    q = load_tokens(Q, offset(strides_q, image, head, y, x), strides_q, inside, D, BLOCK_D)
    grad = load_tokens(Grad, offset(strides_g, image, head, y, x), strides_g, inside, D, BLOCK_D)
    out = load_stored(Out, token, head, heads, inside, D, BLOCK_D)
    lse = tl.load(at(Lse, token, head, heads), mask=inside, other=float("inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(at(Delta, token, head, heads), delta, mask=inside)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    routes = (image.to(tl.int64) * regions + region) * topk
    for start in range(0, topk * height * width, BLOCK_N):
        ky, kx, known = listed(Route, routes, start + tl.arange(0, BLOCK_N), topk, sizes)
        k = load_tokens(K, offset(strides_k, image, head, ky, kx), strides_k, known, D, BLOCK_D)
        v = load_tokens(V, offset(strides_v, image, head, ky, kx), strides_v, known, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.exp2(tl.where(known[None, :], logits, float("-inf")) - lse[:, None])
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    store_tokens(DQ, token, head, heads, inside, dq * scale, D, BLOCK_D)


@tuned(SIZES, PAIR)
def backward_keys_kernel(
    Q, K, V, Readers, Starts, Grad, Lse, Delta, DK, DV, strides_q, strides_k, strides_v, strides_g,
    regions, parts, topk, heads, H, W, columns, height, width, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys of one region, from the queries of all regions that are routed to it.

    Readers (B, regions * topk) lists those, region after region; Starts (B, regions + 1) is where each list begins.
    """
    sizes = heads, H, W, columns, height, width
    image, head, region, y, x, inside = own(regions, parts, sizes, BLOCK_M)
    k = load_tokens(K, offset(strides_k, image, head, y, x), strides_k, inside, D, BLOCK_D)
    v = load_tokens(V, offset(strides_v, image, head, y, x), strides_v, inside, D, BLOCK_D)
    dk, dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lists = Starts + image.to(tl.int64) * (regions + 1) + region
    first, last = tl.load(lists).to(tl.int32), tl.load(lists + 1).to(tl.int32)  # as `listed` expects its counts
    for start in range(0, (last - first) * height * width, BLOCK_N):
        lane = start + tl.arange(0, BLOCK_N)
        qy, qx, known = listed(Readers, image.to(tl.int64) * regions * topk + first, lane, last - first, sizes)
        token = number(image, qy, qx, sizes, strides_q)
        q = load_tokens(Q, offset(strides_q, image, head, qy, qx), strides_q, known, D, BLOCK_D)
        grad = load_tokens(Grad, offset(strides_g, image, head, qy, qx), strides_g, known, D, BLOCK_D)
        lse = tl.load(at(Lse, token, head, heads), mask=known, other=float("inf"))
        delta = tl.load(at(Delta, token, head, heads), mask=known, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # (keys, queries)
        p = tl.exp2(logits - lse[None, :])
        ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dv += tl.dot(p.to(grad.dtype), grad, input_precision=PRECISION)
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    token = number(image, y, x, sizes, strides_q)
    store_tokens(DK, token, head, heads, inside, dk * scale, D, BLOCK_D)
    store_tokens(DV, token, head, heads, inside, dv, D, BLOCK_D)
