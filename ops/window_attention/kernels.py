"""Window attention as Triton kernels: a program reads its windows through strides, without partitioning the map.

The tokens of a window take PADDED lanes. Small windows are packed, PACK of them into one tile of BLOCK lanes; large
ones are cut into several tiles. No two programs write to the same location, so results do not depend on their order.
"""

import triton
from triton import language as tl

from ..launching import AHEAD, tuned, unlimited
from ..tiles import LOG2E, at, balanced, load_keys, load_tokens, look_up, offset, store_tokens, wide

# arguments that change with the map; the last is 1 if windows are grids, else 0
SIZES = ("pitch_q", "pitch", "packs", "total", "share", "heads", "H", "W", "GH", "GW", "grid")


@triton.jit
def position(lane, WW: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr, PACK: tl.constexpr):
    """For each lane, its window in a pack, its token, row and column. If windows are not packed, the window is 0."""
    if PACK == 1:
        window, token = 0, lane
    else:
        window, token = lane // PADDED, lane % PADDED
    # token // WW, computed for the lanes of every layout; a product is exact if tokens times WW is below 65536
    if WW <= 64 and TOKENS <= 1024:
        row = token * (65536 // WW + 1) >> 16
    else:
        row = token // WW
    return window, token, row, token - row * WW


@triton.jit
def locate(
    lane, pack, sizes,
    WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr, PADDED: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """For each lane: window, row and column in it, row and column of its pixel, is it a token, is it on the map.

    If windows are not packed, the window is one number for all lanes. Without EDGE, no window extends beyond the map,
    so all tokens are on it.
    """
    _, H, W, GH, GW, grid = sizes
    window, token, a, c = position(lane, WW, WH * WW, PADDED, PACK)
    window += pack * PACK
    # tokens are 1 apart and windows WH and WW, or the other way round: tokens GH and GW, windows 1
    step_y, step_x = 1 + grid * (GH - 1), 1 + grid * (GW - 1)
    top, left = window // GW * (WH + grid * (1 - WH)), window % GW * (WW + grid * (1 - WW))
    if PACK == 1:
        real = token < WH * WW
    else:
        real = (token < WH * WW) & (window < GH * GW)
    if EDGE:
        inside = real & (a < tl.cdiv(H - top, step_y)) & (c < tl.cdiv(W - left, step_x))
    else:
        inside = real
    return window, a, c, top + a * step_y, left + c * step_x, real, inside


@triton.jit
def load_table(Bias, head, query, key, WH: tl.constexpr, WW: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr):
    """The rows of a head's table for the tiles from lanes `query` and `key` on, and how many entries precede them."""
    # if a window is several tiles, each has tokens of only a few of its rows
    tall: tl.constexpr = BLOCK // WW + 2 if LARGE and BLOCK // WW + 2 < WH else WH
    N: tl.constexpr = (2 * tall - 1) * (2 * WW - 1)
    before = 0
    if LARGE:
        before = tl.maximum(key // WW - query // WW - tall + WH, 0) * (2 * WW - 1)
    i = tl.arange(0, triton.next_power_of_2(N))
    inside = (i < N) & (before + i < (2 * WH - 1) * (2 * WW - 1))
    return tl.load(Bias + head * ((2 * WH - 1) * (2 * WW - 1)) + before + i, mask=inside, other=0.0), before


@triton.jit
def entries(before, queries, keys, WH: tl.constexpr, WW: tl.constexpr):
    """The indices of pairs in a table without its first `before` entries; tokens are as `position` returns them."""
    # lanes after the last token are treated like it, so that every pair has an entry
    last: tl.constexpr = (WH - 1) * (2 * WW - 1) + WW - 1
    from_query = tl.minimum(queries[2] * (2 * WW - 1) + queries[3], last)
    to_key = tl.minimum(keys[2] * (2 * WW - 1) + keys[3], last) + (last - before)
    return to_key[None, :] - from_query[:, None]


@triton.jit
def shift(
    Bias, head, query, key,
    WH: tl.constexpr, WW: tl.constexpr, PADDED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is added to the logits of a tile of queries from lane `query` on and one of keys from `key` on.

    Entries of the table, and -inf for lanes that are not keys and for pairs from different windows: the same for all
    packs.
    """
    queries = position(query + tl.arange(0, BLOCK), WW, WH * WW, PADDED, PACK)
    keys = position(key + tl.arange(0, BLOCK), WW, WH * WW, PADDED, PACK)
    if Bias is not None:
        table, before = load_table(Bias, head, query, key, WH, WW, BLOCK, PADDED * PACK > BLOCK)
        added = look_up(table.to(tl.float32), entries(before, queries, keys, WH, WW))
    else:
        added = tl.zeros([BLOCK, BLOCK], tl.float32)
    if PADDED > WH * WW:
        added = tl.where((keys[1] < WH * WW)[None, :], added, float("-inf"))
    if PACK > 1:
        added = tl.where(queries[0][:, None] == keys[0][None, :], added, float("-inf"))
    return added


@triton.jit
def relate(q, k, scale, added, inside, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits, (queries, keys); if MASKED, keys that are not inside are masked."""
    logits = tl.fma(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, added)
    if MASKED:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    return logits


@triton.jit
def load_queries(Q, strides, image, head, queries, SHARED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The queries of a tile; if SHARED, they come from the single window of queries of the image."""
    if SHARED:
        start = offset(strides, image, head, queries[1], queries[2])
    else:
        start = offset(strides, image, head, queries[3], queries[4])
    return load_tokens(Q, start, strides, queries[6], D, BLOCK_D)


@triton.jit
def finite(best):
    """The largest logits in base 2; 0 for lanes without any key, which are never stored."""
    return tl.where(best == float("-inf"), 0.0, best * LOG2E)


@triton.jit
def number(image, queries, sizes, strides):
    """Each lane's pixel: the number of pixels in all images before its own, and its index within its image."""
    return image.to(tl.int64) * sizes[1] * sizes[2], wide(queries[3], strides[5]) * sizes[2] + queries[4]


@triton.jit
def finish(Out, Lse, base, total, out, image, head, queries, sizes, strides, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the results of queries, and the base-2 logarithms of the sums of their softmax."""
    total = tl.where(total == 0.0, 1.0, total)
    token = number(image, queries, sizes, strides)
    store_tokens(Out, token, head, sizes[0], queries[6], out / total[:, None], D, BLOCK_D)
    tl.store(at(Lse, token, head, sizes[0]), base + tl.log2(total), mask=queries[6])


@triton.jit
def attend(
    Q, K, V, K0, V0, Out, Lse, strides_q, strides_k, strides_v, scale, added, flat, head, packs, sizes,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pack of one head, which is one tile; `flat` is its index over all images."""
    pack, image = flat % packs, flat // packs
    tokens = locate(tl.arange(0, BLOCK), pack, sizes, WH, WW, EDGE, PADDED, PACK)
    q = load_queries(Q, strides_q, image, head, tokens, SHARED, D, BLOCK_D)
    k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, tokens[3], tokens[4], tokens[6], D, BLOCK_D)
    logits = relate(q, k, scale, added, tokens[6], EDGE and K0 is None, PRECISION)
    base = finite(tl.max(logits, 1))
    p = tl.exp2(logits * LOG2E - base[:, None])
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    finish(Out, Lse, base, tl.sum(p, 1), out, image, head, tokens, sizes, strides_q, D, BLOCK_D)


@tuned(SIZES, AHEAD)
def forward_kernel(
    Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v,
    total, share, packs, heads, H, W, GH, GW, grid, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """If a window fits in one tile: `share` packs of one head, for which the table is looked up once.

    Without a table a program has one pack: sharing would gain nothing that is worth the registers.
    """
    sizes = heads, H, W, GH, GW, grid
    head, group = tl.program_id(0) % heads, tl.program_id(0) // heads
    added = shift(Bias, head, 0, 0, WH, WW, PADDED, PACK, BLOCK)
    if Bias is None:
        attend(
            Q, K, V, K0, V0, Out, Lse, strides_q, strides_k, strides_v, scale, added, group, head, packs, sizes,
            D, WH, WW, SHARED, EDGE, PADDED, PACK, BLOCK, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        for flat in range(group * share, tl.minimum(group * share + share, total)):
            attend(
                Q, K, V, K0, V0, Out, Lse, strides_q, strides_k, strides_v, scale, added, flat, head, packs, sizes,
                D, WH, WW, SHARED, EDGE, PADDED, PACK, BLOCK, BLOCK_D, PRECISION,
            )  # fmt: skip


@triton.jit
def query_place(image, queries, sizes, strides, SHARED: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr):
    """Where the gradient of a query is stored: at its pixel, or (SHARED) at its token in a buffer of all windows."""
    if SHARED:
        _, _, _, GH, GW, _ = sizes
        start = image.to(tl.int64) * GH * GW * WH * WW
        return start, ((queries[0] * WH + queries[1]) * WW + queries[2]).to(tl.int64)
    else:
        return number(image, queries, sizes, strides)


@tuned(SIZES, unlimited(AHEAD))
def backward_kernel(
    Q, K, V, Bias, K0, V0, Grad, Lse, DQ, DK, DV, DPairs, DOutside, strides_q, strides_k, strides_v, strides_g,
    pitch_q, pitch, total, share, packs, heads, H, W, GH, GW, grid, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """If a window fits in one tile: all gradients of `share` packs, with those of bias, K0 and V0 summed over them.

    Gradients are stored as soon as they are complete: registers limit how many programs share a multiprocessor.
    """
    sizes = heads, H, W, GH, GW, grid
    head, group = tl.program_id(0) % heads, tl.program_id(0) // heads
    lanes = tl.arange(0, BLOCK)
    pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    dk0, dv0 = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    added = shift(Bias, head, 0, 0, WH, WW, PADDED, PACK, BLOCK)
    for flat in range(group * share, tl.minimum(group * share + share, total)):
        pack, image = flat % packs, flat // packs
        tokens = locate(lanes, pack, sizes, WH, WW, EDGE, PADDED, PACK)
        token, inside = number(image, tokens, sizes, strides_q), tokens[6]
        beyond = (tokens[5] & (inside == 0))[:, None]
        k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, tokens[3], tokens[4], tokens[6], D, BLOCK_D)
        q = load_queries(Q, strides_q, image, head, tokens, SHARED, D, BLOCK_D)
        grad = load_tokens(Grad, offset(strides_g, image, head, tokens[3], tokens[4]), strides_g, inside, D, BLOCK_D)
        lse = tl.load(at(Lse, token, head, heads), mask=inside, other=float("inf"))
        logits = relate(q, k, scale, added, tokens[6], EDGE and K0 is None, PRECISION)
        p = tl.exp2(logits * LOG2E - lse[:, None])
        if Grad.dtype.element_ty == tl.float32:  # large logits: lse is rounded, and a row of ds would not sum to zero
            weight = tl.sum(p, 1)
            p /= tl.where(weight == 0.0, 1.0, weight)[:, None]
        dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        store_tokens(DV, token, head, pitch, inside, dv, D, BLOCK_D)
        if K0 is not None:
            dv0 += tl.sum(tl.where(beyond, dv, 0.0), 0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])
        if K0 is not None:
            ds = p * (dp - balanced(delta, tl.sum(p, 1), tl.sum(ds, 1))[:, None])
        if DPairs is not None:
            pairs += ds
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION) * scale
        store_tokens(DK, token, head, pitch, inside, dk, D, BLOCK_D)
        if K0 is not None:
            dk0 += tl.sum(tl.where(beyond, dk, 0.0), 0)
        dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION) * scale
        place = query_place(image, tokens, sizes, strides_q, SHARED, WH, WW)
        store_tokens(DQ, place, head, pitch_q, inside, dq, D, BLOCK_D)
    if K0 is not None:
        store_outside(DOutside, group, head, heads, dk0, dv0, D, BLOCK_D)
    if DPairs is not None:
        place = (group * heads + head).to(tl.int64) * (BLOCK * BLOCK) + lanes[:, None] * BLOCK + lanes[None, :]
        tl.store(DPairs + place, pairs)


@triton.jit
def store_outside(DOutside, place, head, heads, dk0, dv0, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores one program's gradients of K0 and V0; DOutside is (programs of a head, heads, 2, D)."""
    d = tl.arange(0, BLOCK_D)
    start = (place * heads + head).to(tl.int64) * (2 * D) + d
    tl.store(DOutside + start, dk0, mask=d < D)
    tl.store(DOutside + start + D, dv0, mask=d < D)
