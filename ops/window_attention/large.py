"""Triton kernels for windows of several tiles: the softmax is computed online, or from its known sum.

This module continues kernels.py and uses its functions for the interaction of a tile of queries with one of keys.
"""

import triton
from triton import language as tl

from ..launching import AHEAD, BACKWARD, KEPT, TILES, tuned, unlimited
from ..tiles import (
    LOG2E,
    at,
    balanced,
    load_channels,
    load_keys,
    load_stored,
    load_tokens,
    look_up,
    offset,
    store_tokens,
)
from .kernels import (
    SIZES,
    entries,
    finish,
    finite,
    load_queries,
    load_table,
    locate,
    number,
    position,
    query_place,
    relate,
    shift,
    store_outside,
)


@triton.jit
def meet(
    best, total, out, q, K, V, K0, V0, strides_k, strides_v, image, head, pack, key, added, scale, sizes,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds KEYS keys, from lane `key` on, to the online softmax of a tile of queries: maxima, sums and results."""
    keys = locate(key + tl.arange(0, KEYS), pack, sizes, WH, WW, EDGE, PADDED, 1)
    k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[3], keys[4], keys[6], D, BLOCK_D)
    logits = relate(q, k, scale, added, keys[6], EDGE and K0 is None, PRECISION)
    new = tl.maximum(best, tl.max(logits, 1))
    base = finite(new)
    p, shrink = tl.exp2(logits * LOG2E - base[:, None]), tl.exp2(best * LOG2E - base)
    total = total * shrink + tl.sum(p, 1)
    out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return new, total, out


@tuned(SIZES, TILES)
def forward_tiles_kernel(
    Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v,
    packs, heads, H, W, GH, GW, grid, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head in one window."""
    sizes = heads, H, W, GH, GW, grid
    parts: tl.constexpr = PADDED // BLOCK
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    query, rest = rest % parts * BLOCK, rest // parts
    pack, image = rest % packs, rest // packs
    queries = locate(query + tl.arange(0, BLOCK), pack, sizes, WH, WW, EDGE, PADDED, 1)
    q = load_queries(Q, strides_q, image, head, queries, SHARED, D, BLOCK_D)
    best, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for key in range(0, PADDED, BLOCK):
        added = shift(Bias, head, query, key, WH, WW, PADDED, 1, BLOCK)
        best, total, out = meet(
            best, total, out, q, K, V, K0, V0, strides_k, strides_v, image, head, pack, key, added, scale, sizes,
            D, WH, WW, EDGE, PADDED, BLOCK, BLOCK_D, PRECISION,
        )  # fmt: skip
    finish(Out, Lse, finite(best), total, out, image, head, queries, sizes, strides_q, D, BLOCK_D)


@triton.jit
def keep(Bias, head, query, key, WH: tl.constexpr, WW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """What `shift` returns for QUERIES and KEYS lanes: bits in half precision, in the upper half of 32 bits."""
    queries = position(query + tl.arange(0, QUERIES), WW, WH * WW, WH * WW, 1)
    keys = position(key + tl.arange(0, KEYS), WW, WH * WW, WH * WW, 1)
    table, _ = load_table(Bias, head, query, 0, WH, WW, QUERIES, False)
    found = look_up(table, entries(0, queries, keys, WH, WW))
    found = tl.where((keys[1] < WH * WW)[None, :], found, float("-inf")).to(table.dtype)
    return found.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def keep_two(
    Bias, head, query, key, WH: tl.constexpr, WW: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What `keep` returns for a tile of keys and, in the lower half, for the next tile, whether it has keys or not."""
    next = keep(Bias, head, query, key + BLOCK, WH, WW, QUERIES, BLOCK)
    return keep(Bias, head, query, key, WH, WW, QUERIES, BLOCK) | ((next >> 16) & 0xFFFF)


@triton.jit
def halves(bits, dtype: tl.constexpr):
    """What `keep` returns, in float32."""
    if dtype == tl.bfloat16:
        return (bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        return (bits >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def attend_kept(
    Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v, total, share, packs, sizes, scale,
    head, query, group,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, PADDED: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one head, from lane `query` on, in the windows of a group, as `forward_kept_kernel` says."""
    dtype: tl.constexpr = Bias.dtype.element_ty
    whole: tl.constexpr = (WH * WW - TAIL + BLOCK - 1) // BLOCK
    kept = keep_two(Bias, head, query, 0, WH, WW, QUERIES, BLOCK)
    if whole > 2:
        kept_more = keep_two(Bias, head, query, 2 * BLOCK, WH, WW, QUERIES, BLOCK)
    if TAIL > 0:
        kept_last = keep(Bias, head, query, whole * BLOCK, WH, WW, QUERIES, TAIL)
    for flat in range(group * share, tl.minimum(group * share + share, total)):
        pack, image = flat % packs, flat // packs
        queries = locate(query + tl.arange(0, QUERIES), pack, sizes, WH, WW, False, PADDED, 1)
        q = load_queries(Q, strides_q, image, head, queries, SHARED, D, BLOCK_D)
        best, sums = tl.full([QUERIES], float("-inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
        out = tl.zeros([QUERIES, BLOCK_D], tl.float32)
        # 0, unknown to the compiler: otherwise it would unpack both numbers once, before the loop
        zero = flat >> 31
        for tile in tl.static_range(whole):
            two = kept if tile < 2 else kept_more
            added = halves((two ^ zero) << tile % 2 * 16, dtype)
            best, sums, out = meet(
                best, sums, out, q, K, V, K0, V0, strides_k, strides_v, image, head, pack, tile * BLOCK, added, scale,
                sizes, D, WH, WW, False, PADDED, BLOCK, BLOCK_D, PRECISION,
            )  # fmt: skip
        if TAIL > 0:
            best, sums, out = meet(
                best, sums, out, q, K, V, K0, V0, strides_k, strides_v, image, head, pack, whole * BLOCK,
                halves(kept_last, dtype), scale, sizes, D, WH, WW, False, PADDED, TAIL, BLOCK_D, PRECISION,
            )  # fmt: skip
        finish(Out, Lse, finite(best), sums, out, image, head, queries, sizes, strides_q, D, BLOCK_D)


@tuned(SIZES, KEPT)
def forward_kept_kernel(
    Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v,
    total, share, packs, heads, H, W, GH, GW, grid, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head in `share` windows of up to four tiles of keys, with a table in half precision.

    The windows divide the map. The table entries of the tile are looked up once and kept in registers, two numbers in
    each. If the last keys are fewer than a tile, they take TAIL more lanes. So do the last queries if these are at most
    a quarter of a tile; such programs do less, and come last, where they fill the multiprocessors that are free first.
    """
    sizes = heads, H, W, GH, GW, grid
    parts: tl.constexpr = (WH * WW + BLOCK - 1) // BLOCK
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    if TAIL > 0 and 4 * TAIL <= BLOCK:
        full = tl.cdiv(total, share) * (parts - 1)
        if rest < full:
            attend_kept(
                Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v, total, share, packs, sizes, scale,
                head, rest % (parts - 1) * BLOCK, rest // (parts - 1),
                D, WH, WW, SHARED, PADDED, BLOCK, BLOCK, TAIL, BLOCK_D, PRECISION,
            )  # fmt: skip
        else:
            attend_kept(
                Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v, total, share, packs, sizes, scale,
                head, (parts - 1) * BLOCK, rest - full,
                D, WH, WW, SHARED, PADDED, TAIL, BLOCK, TAIL, BLOCK_D, PRECISION,
            )  # fmt: skip
    else:
        attend_kept(
            Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v, total, share, packs, sizes, scale,
            head, rest % parts * BLOCK, rest // parts,
            D, WH, WW, SHARED, PADDED, BLOCK, BLOCK, TAIL, BLOCK_D, PRECISION,
        )  # fmt: skip


@tuned(SIZES, TILES)
def backward_queries_kernel(
    Q, K, V, Bias, K0, V0, Grad, Out, Lse, DQ, Delta, Inverse, strides_q, strides_k, strides_v, strides_g,
    pitch_q, packs, heads, H, W, GH, GW, grid, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and the delta that the softmax subtracts from the gradients of their logits.

    In float32 also what makes a row's probabilities sum to 1: the inverse of their sum.
    """
    sizes = heads, H, W, GH, GW, grid
    parts: tl.constexpr = PADDED // BLOCK
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    query, rest = rest % parts * BLOCK, rest // parts
    pack, image = rest % packs, rest // packs
    lanes = tl.arange(0, BLOCK)
    queries = locate(query + lanes, pack, sizes, WH, WW, EDGE, PADDED, 1)
    token, inside = number(image, queries, sizes, strides_q), queries[6]
    q = load_queries(Q, strides_q, image, head, queries, SHARED, D, BLOCK_D)
    grad = load_tokens(Grad, offset(strides_g, image, head, queries[3], queries[4]), strides_g, inside, D, BLOCK_D)
    lse = tl.load(at(Lse, token, head, heads), mask=inside, other=float("inf"))
    out = load_stored(Out, token, head, heads, inside, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    balances: tl.constexpr = K0 is not None or Inverse is not None
    weight, rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    beyond = tl.zeros([BLOCK], tl.float32)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for key in range(0, PADDED, BLOCK):
        keys = locate(key + lanes, pack, sizes, WH, WW, EDGE, PADDED, 1)
        k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[3], keys[4], keys[6], D, BLOCK_D)
        added = shift(Bias, head, query, key, WH, WW, PADDED, 1, BLOCK)
        logits = relate(q, k, scale, added, keys[6], EDGE and K0 is None, PRECISION)
        p = tl.exp2(logits * LOG2E - lse[:, None])
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        if balances:
            weight += tl.sum(p, 1)
            rest += tl.sum(ds, 1)
        if K0 is not None and Inverse is not None:
            beyond += tl.sum(tl.where(keys[6][None, :], 0.0, p), 1)
    if balances:
        delta = balanced(delta, weight, rest)
    if Inverse is not None:
        inverse = 1.0 / tl.where(weight == 0.0, 1.0, weight)
        if K0 is not None:  # its terms are balanced: where most keys of a window are K0, they are large and dq is small
            dq -= (rest * inverse * beyond)[:, None] * load_channels(K0, head, D, BLOCK_D).to(tl.float32)[None, :]
        dq *= inverse[:, None]
        tl.store(at(Inverse, token, head, heads), inverse, mask=inside)
    tl.store(at(Delta, token, head, heads), delta, mask=inside)
    place = query_place(image, queries, sizes, strides_q, SHARED, WH, WW)
    store_tokens(DQ, place, head, pitch_q, inside, dq * scale, D, BLOCK_D)


@tuned(SIZES, BACKWARD)
def backward_keys_kernel(
    Q, K, V, Bias, K0, V0, Grad, Lse, Delta, Inverse, DK, DV, DOutside, strides_q, strides_k, strides_v, strides_g,
    pitch, total, share, packs, heads, H, W, GH, GW, grid, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys in each of `share` windows, and those of K0 and V0."""
    sizes = heads, H, W, GH, GW, grid
    parts: tl.constexpr = PADDED // BLOCK
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    part, group = rest % parts, rest // parts
    lanes = tl.arange(0, BLOCK)
    dk0, dv0 = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for flat in range(group * share, tl.minimum(group * share + share, total)):
        pack, image = flat % packs, flat // packs
        keys = locate(part * BLOCK + lanes, pack, sizes, WH, WW, EDGE, PADDED, 1)
        k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[3], keys[4], keys[6], D, BLOCK_D)
        dk, dv = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for query in range(0, PADDED, BLOCK):
            queries = locate(query + lanes, pack, sizes, WH, WW, EDGE, PADDED, 1)
            token, inside = number(image, queries, sizes, strides_q), queries[6]
            q = load_queries(Q, strides_q, image, head, queries, SHARED, D, BLOCK_D)
            start = offset(strides_g, image, head, queries[3], queries[4])
            grad = load_tokens(Grad, start, strides_g, inside, D, BLOCK_D)
            lse = tl.load(at(Lse, token, head, heads), mask=inside, other=float("inf"))
            delta = tl.load(at(Delta, token, head, heads), mask=inside, other=0.0)
            added = shift(Bias, head, query, part * BLOCK, WH, WW, PADDED, 1, BLOCK)
            logits = relate(q, k, scale, added, keys[6], EDGE and K0 is None, PRECISION)
            p = tl.exp2(logits * LOG2E - lse[:, None])
            if Inverse is not None:
                p *= tl.load(at(Inverse, token, head, heads), mask=inside, other=0.0)[:, None]
            ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dv += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
        dk *= scale
        token = number(image, keys, sizes, strides_q)
        store_tokens(DK, token, head, pitch, keys[6], dk, D, BLOCK_D)
        store_tokens(DV, token, head, pitch, keys[6], dv, D, BLOCK_D)
        if K0 is not None:
            beyond = (keys[5] & (keys[6] == 0))[:, None]
            dk0 += tl.sum(tl.where(beyond, dk, 0.0), 0)
            dv0 += tl.sum(tl.where(beyond, dv, 0.0), 0)
    if K0 is not None:
        store_outside(DOutside, group * parts + part, head, heads, dk0, dv0, D, BLOCK_D)


@tuned(SIZES, unlimited(AHEAD))
def backward_bias_kernel(
    Q, K, V, Bias, K0, V0, Grad, Lse, Delta, Inverse, DPairs, strides_q, strides_k, strides_v, strides_g,
    total, share, packs, heads, H, W, GH, GW, grid, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHARED: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits between a tile of queries and one of keys, summed over `share` windows."""
    sizes = heads, H, W, GH, GW, grid
    parts: tl.constexpr = PADDED // BLOCK
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    key, rest = rest % parts * BLOCK, rest // parts
    query, group = rest % parts * BLOCK, rest // parts
    lanes = tl.arange(0, BLOCK)
    added = shift(Bias, head, query, key, WH, WW, PADDED, 1, BLOCK)
    pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    for flat in range(group * share, tl.minimum(group * share + share, total)):
        pack, image = flat % packs, flat // packs
        keys = locate(key + lanes, pack, sizes, WH, WW, EDGE, PADDED, 1)
        queries = locate(query + lanes, pack, sizes, WH, WW, EDGE, PADDED, 1)
        token, inside = number(image, queries, sizes, strides_q), queries[6]
        k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[3], keys[4], keys[6], D, BLOCK_D)
        q = load_queries(Q, strides_q, image, head, queries, SHARED, D, BLOCK_D)
        grad = load_tokens(Grad, offset(strides_g, image, head, queries[3], queries[4]), strides_g, inside, D, BLOCK_D)
        lse = tl.load(at(Lse, token, head, heads), mask=inside, other=float("inf"))
        delta = tl.load(at(Delta, token, head, heads), mask=inside, other=0.0)
        logits = relate(q, k, scale, added, keys[6], EDGE and K0 is None, PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(logits * LOG2E - lse[:, None])
        if Inverse is not None:
            p *= tl.load(at(Inverse, token, head, heads), mask=inside, other=0.0)[:, None]
        pairs += p * (dp - delta[:, None])
    start, row = (group * heads + head).to(tl.int64) * (PADDED * PADDED), query + lanes
    if PADDED * PADDED >= 2**31:
        row = row.to(tl.int64)
    tl.store(DPairs + start + row[:, None] * PADDED + (key + lanes)[None, :], pairs)
