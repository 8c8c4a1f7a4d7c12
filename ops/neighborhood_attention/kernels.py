"""Neighborhood attention as Triton kernels: keys are read in place, each once for a whole tile of queries.

On each axis the positions that are equal modulo the dilation form a line, and all rows and columns here are indices
along lines. A tile is a rectangle in one pair of lines. The union of the tokens that interact with those of a tile is a
rectangle too. It is read in blocks of lanes, and pairs that do not interact are masked. No two programs write to the
same location.

An axis is (pixels of the map, dilation, pixels of the map as extended by `outside`, tokens of a tile, tiles).
"""

import triton
from triton import language as tl

from ..launching import EASY, LIMITED, tuned, unlimited
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
    wide,
)

LARGEST = tl.constexpr(1024)  # most entries of a table that is kept in shared memory: windows up to 15 x 15


# arguments that change with the map
SIZES = (
    *("parts", "total", "share", "top", "left", "width", "pitch", "heads"),
    *("H", "step_h", "full_h", "tile_h", "tiles_h", "W", "step_w", "full_w", "tile_w", "tiles_w"),
)


@triton.jit
def tile(number, rows, columns):
    """The image of a tile, the pixel at which its pair of lines begins, and its own first row and column."""
    rx, rest = number % columns[1], number // columns[1]
    ry, rest = rest % rows[1], rest // rows[1]
    tx, rest = rest % columns[4], rest // columns[4]
    ty, image = rest % rows[4], rest // rows[4]
    return image, (ry, rx), ty * rows[3], tx * columns[3]


@triton.jit
def length(line, axis):
    """How many positions a line has."""
    return (axis[2] - line + axis[1] - 1) // axis[1]


@triton.jit
def first_key(query, length, WINDOW: tl.constexpr):
    """Where the window of a query begins: centred, and shifted inward at both ends of the line."""
    return tl.minimum(tl.maximum(query - WINDOW // 2, 0), length - WINDOW)


@triton.jit
def keys_of(first, axis, length, WINDOW: tl.constexpr):
    """The first key that the queries of a tile attend to, and the number of keys up to the last."""
    last = tl.minimum(first + axis[3], length) - 1
    start = first_key(first, length, WINDOW)
    return start, first_key(last, length, WINDOW) + WINDOW - start


@triton.jit
def queries_of(first, axis, length, WINDOW: tl.constexpr):
    """The first query that attends to the keys of a tile, and the number of queries up to the last."""
    last = tl.minimum(first + axis[3], length) - 1
    start = tl.where(first < WINDOW, 0, first - WINDOW // 2)
    return start, tl.where(last >= length - WINDOW, length, last + WINDOW // 2 + 1) - start


@triton.jit
def pixels(line, row, column, rows, columns):
    """For tokens in a pair of lines: row, column, the pixel's y and x, and whether it is on the map."""
    y, x = line[0] + row * rows[1], line[1] + column * columns[1]
    # as unsigned integers, negative numbers are large
    return row, column, y, x, (y.to(tl.uint32) < rows[0]) & (x.to(tl.uint32) < columns[0])


@triton.jit
def own(line, top, left, rows, columns, TW: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens of a tile itself, as `pixels` returns them, and which lanes are such tokens."""
    lanes = tl.arange(0, BLOCK)
    return pixels(line, top + lanes // TW, left + lanes % TW, rows, columns), lanes // TW < rows[3]


@triton.jit
def near(start, lanes, span, line, rows, columns):
    """The tokens of a block of lanes in a rectangle; `span` is its first row, first column and width."""
    lane, width = start + lanes, span[2]
    # dividing every lane would be a quarter of all work; the high half of a product with 2**31 / width is exact too
    inverse = (0x7FFFFFFF // width).to(tl.uint32) + 1
    row = tl.umulhi((2 * lane).to(tl.uint32), inverse).to(tl.int32)
    return pixels(line, span[0] + row, span[1] + lane - row * width, rows, columns)


@triton.jit
def windows(queries, inside, lengths, WH: tl.constexpr, WW: tl.constexpr):
    """The first row and column of each query's keys, and the query's ordinal; beyond all keys where not inside."""
    row = tl.where(inside, first_key(queries[0], lengths[0], WH), 1 << 30)
    return row[:, None], first_key(queries[1], lengths[1], WW)[:, None], ordinal(queries, WW)[:, None]


@triton.jit
def ordinal(tokens, WW: tl.constexpr):
    """A number for each token; the difference of two gives the pair's index in a table of relative positions."""
    return tokens[0] * (2 * WW - 1) + tokens[1]


@triton.jit
def load_table(Bias, head, WH: tl.constexpr, WW: tl.constexpr):
    """The table of a head in base 2, for lookups in shared memory; larger tables are read from global memory."""
    N: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    if Bias is not None and N <= LARGEST:
        i = tl.arange(0, triton.next_power_of_2(N))
        return tl.load(Bias + head * N + i, mask=i < N, other=0.0).to(tl.float32) * LOG2E
    else:
        return tl.zeros([1], tl.float32)  # unused


@triton.jit
def relate(q, k, Bias, table, head, scale, seen, keys, WH: tl.constexpr, WW: tl.constexpr, PRECISION: tl.constexpr):
    """Logits in base 2, (queries, keys); `seen` is what `windows` returns for the queries."""
    down, right = keys[0][None, :] - seen[0], keys[1][None, :] - seen[1]
    attended = (down.to(tl.uint32) < WH) & (right.to(tl.uint32) < WW)  # unsigned: negative is large
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if Bias is not None:
        entry = ordinal(keys, WW)[None, :] - seen[2] + ((WH - 1) * (2 * WW - 1) + WW - 1)
        entry = tl.where(attended, entry, 0)
        N: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
        if N <= LARGEST:
            logits += look_up(table, entry)
        else:
            logits += tl.load(Bias + head * N + entry).to(tl.float32) * LOG2E
    return tl.where(attended, logits, float("-inf"))


@triton.jit
def number(image, tokens, rows, columns, strides):
    """Each token's pixel: the number of pixels in all images before its own, and its index within its image."""
    return image.to(tl.int64) * rows[0] * columns[0], wide(tokens[2], strides[5]) * columns[0] + tokens[3]


@tuned(SIZES, LIMITED)
def forward_kernel(
    Q, K, V, Bias, K0, V0, Out, Lse, strides_q, strides_k, strides_v,
    heads, H, step_h, full_h, tile_h, tiles_h, W, step_w, full_w, tile_w, tiles_w, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head, with an online softmax over the keys that they attend to."""
    rows, columns = (H, step_h, full_h, tile_h, tiles_h), (W, step_w, full_w, tile_w, tiles_w)
    head = tl.program_id(0) % heads
    image, line, top, left = tile(tl.program_id(0) // heads, rows, columns)
    lengths, lanes = (length(line[0], rows), length(line[1], columns)), tl.arange(0, BLOCK)
    queries, owned = own(line, top, left, rows, columns, TW, BLOCK)
    inside = owned & queries[4]
    q = load_tokens(Q, offset(strides_q, image, head, queries[2], queries[3]), strides_q, inside, D, BLOCK_D)
    table, seen = load_table(Bias, head, WH, WW), windows(queries, inside, lengths, WH, WW)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_row, height = keys_of(top, rows, lengths[0], WH)
    first_column, width = keys_of(left, columns, lengths[1], WW)
    for start in range(0, height * width, BLOCK):
        keys = near(start, lanes, (first_row, first_column, width), line, rows, columns)
        k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[2], keys[3], keys[4], D, BLOCK_D)
        logits = relate(q, k, Bias, table, head, scale, seen, keys, WH, WW, PRECISION)
        new = tl.maximum(best, tl.max(logits, 1))
        # the first block may not contain any key of a query, and lanes that are not queries never have one
        base = tl.where(new == float("-inf"), 0.0, new)
        p, shrink = tl.exp2(logits - base[:, None]), tl.exp2(best - base)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = new
    total = tl.where(total == 0.0, 1.0, total)
    token = number(image, queries, rows, columns, strides_q)
    store_tokens(Out, token, head, heads, inside, out / total[:, None], D, BLOCK_D)
    tl.store(at(Lse, token, head, heads), best + tl.log2(total), mask=inside)


@tuned(SIZES, unlimited(LIMITED))
def backward_queries_kernel(
    Q, K, V, Bias, K0, V0, Grad, Out, Lse, DQ, Delta, Inverse, strides_q, strides_k, strides_v, strides_g,
    pitch, heads, H, step_h, full_h, tile_h, tiles_h, W, step_w, full_w, tile_w, tiles_w, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and the delta that the softmax subtracts from the gradients of their logits.

    In float32 also what makes a row's probabilities sum to 1: the inverse of their sum.
    """
    rows, columns = (H, step_h, full_h, tile_h, tiles_h), (W, step_w, full_w, tile_w, tiles_w)
    head = tl.program_id(0) % heads
    image, line, top, left = tile(tl.program_id(0) // heads, rows, columns)
    lengths, lanes = (length(line[0], rows), length(line[1], columns)), tl.arange(0, BLOCK)
    queries, owned = own(line, top, left, rows, columns, TW, BLOCK)
    inside, token = owned & queries[4], number(image, queries, rows, columns, strides_q)
    q = load_tokens(Q, offset(strides_q, image, head, queries[2], queries[3]), strides_q, inside, D, BLOCK_D)
    grad = load_tokens(Grad, offset(strides_g, image, head, queries[2], queries[3]), strides_g, inside, D, BLOCK_D)
    out = load_stored(Out, token, head, heads, inside, D, BLOCK_D)
    lse = tl.load(at(Lse, token, head, heads), mask=inside, other=float("inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    balances: tl.constexpr = K0 is not None or Inverse is not None
    weight, rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    beyond = tl.zeros([BLOCK], tl.float32)
    table, seen = load_table(Bias, head, WH, WW), windows(queries, inside, lengths, WH, WW)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_row, height = keys_of(top, rows, lengths[0], WH)
    first_column, width = keys_of(left, columns, lengths[1], WW)
    for start in range(0, height * width, BLOCK):
        keys = near(start, lanes, (first_row, first_column, width), line, rows, columns)
        k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[2], keys[3], keys[4], D, BLOCK_D)
        logits = relate(q, k, Bias, table, head, scale, seen, keys, WH, WW, PRECISION)
        p = tl.exp2(logits - lse[:, None])
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        if balances:
            weight += tl.sum(p, 1)
            rest += tl.sum(ds, 1)
        if K0 is not None and Inverse is not None:
            beyond += tl.sum(tl.where(keys[4][None, :], 0.0, p), 1)
    if balances:
        delta = balanced(delta, weight, rest)
    if Inverse is not None:
        inverse = 1.0 / tl.where(weight == 0.0, 1.0, weight)
        if K0 is not None:  # its terms are balanced: where most keys of a query are K0, they are large and dq is small
            dq -= (rest * inverse * beyond)[:, None] * load_channels(K0, head, D, BLOCK_D).to(tl.float32)[None, :]
        dq *= inverse[:, None]
        tl.store(at(Inverse, token, head, heads), inverse, mask=inside)
    tl.store(at(Delta, token, head, heads), delta, mask=inside)
    store_tokens(DQ, token, head, pitch, inside, dq * scale, D, BLOCK_D)


@triton.jit
def differentiate(
    Q, Bias, Grad, Lse, Delta, Inverse, strides_q, strides_g, image, head, heads, token, queries, inside,
    lengths, k, v, keys, table, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries, the gradients of their results, and their probabilities and gradients of logits, (queries, keys)."""
    q = load_tokens(Q, offset(strides_q, image, head, queries[2], queries[3]), strides_q, inside, D, BLOCK_D)
    grad = load_tokens(Grad, offset(strides_g, image, head, queries[2], queries[3]), strides_g, inside, D, BLOCK_D)
    lse = tl.load(at(Lse, token, head, heads), mask=inside, other=float("inf"))
    delta = tl.load(at(Delta, token, head, heads), mask=inside, other=0.0)
    seen = windows(queries, inside, lengths, WH, WW)
    logits = relate(q, k, Bias, table, head, scale, seen, keys, WH, WW, PRECISION)
    p = tl.exp2(logits - lse[:, None])
    if Inverse is not None:
        p *= tl.load(at(Inverse, token, head, heads), mask=inside, other=0.0)[:, None]
    return q, grad, p, p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@tuned(SIZES, EASY)
def backward_keys_kernel(
    Q, K, V, Bias, K0, V0, Grad, Lse, Delta, Inverse, DK, DV, DOutside, strides_q, strides_k, strides_v, strides_g,
    pitch, heads, H, step_h, full_h, tile_h, tiles_h, W, step_w, full_w, tile_w, tiles_w, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys from the queries that attend to them, and its share of those of K0 and V0."""
    rows, columns = (H, step_h, full_h, tile_h, tiles_h), (W, step_w, full_w, tile_w, tiles_w)
    head = tl.program_id(0) % heads
    image, line, top, left = tile(tl.program_id(0) // heads, rows, columns)
    lengths, lanes = (length(line[0], rows), length(line[1], columns)), tl.arange(0, BLOCK)
    keys, owned = own(line, top, left, rows, columns, TW, BLOCK)
    k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[2], keys[3], keys[4], D, BLOCK_D)
    table = load_table(Bias, head, WH, WW)
    dk, dv = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_row, height = queries_of(top, rows, lengths[0], WH)
    first_column, width = queries_of(left, columns, lengths[1], WW)
    for start in range(0, height * width, BLOCK):
        queries = near(start, lanes, (first_row, first_column, width), line, rows, columns)
        inside, token = queries[4], number(image, queries, rows, columns, strides_q)
        q, grad, p, ds = differentiate(
            Q, Bias, Grad, Lse, Delta, Inverse, strides_q, strides_g, image, head, heads, token, queries, inside,
            lengths, k, v, keys, table, scale, D, WH, WW, BLOCK_D, PRECISION,
        )  # fmt: skip
        dv += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    dk *= scale
    token = number(image, keys, rows, columns, strides_q)
    store_tokens(DK, token, head, pitch, owned & keys[4], dk, D, BLOCK_D)
    store_tokens(DV, token, head, pitch, owned & keys[4], dv, D, BLOCK_D)
    if K0 is not None:
        beyond, d = (owned & (keys[4] == 0))[:, None], tl.arange(0, BLOCK_D)
        place = tl.program_id(0).to(tl.int64) * (2 * D) + d
        tl.store(DOutside + place, tl.sum(tl.where(beyond, dk, 0.0), 0), mask=d < D)
        tl.store(DOutside + place + D, tl.sum(tl.where(beyond, dv, 0.0), 0), mask=d < D)


@tuned(SIZES, EASY)
def backward_bias_kernel(
    Q, K, V, Bias, K0, V0, Grad, Lse, Delta, Inverse, DPairs, strides_q, strides_k, strides_v, strides_g,
    top, left, width, parts, total, share,
    heads, H, step_h, full_h, tile_h, tiles_h, W, step_w, full_w, tile_w, tiles_w, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of logits between a tile of queries and a block of the keys around it, summed over `share` tiles.

    `top`, `left` and `width` describe the rectangle that contains the keys of any tile, relative to that tile.
    """
    rows, columns = (H, step_h, full_h, tile_h, tiles_h), (W, step_w, full_w, tile_w, tiles_w)
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    part, group = rest % parts, rest // parts
    lanes = tl.arange(0, BLOCK)
    table = load_table(Bias, head, WH, WW)
    pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
    for flat in range(group * share, tl.minimum(group * share + share, total)):
        image, line, y, x = tile(flat, rows, columns)
        lengths = (length(line[0], rows), length(line[1], columns))
        queries, owned = own(line, y, x, rows, columns, TW, BLOCK)
        inside, token = owned & queries[4], number(image, queries, rows, columns, strides_q)
        keys = near(part * BLOCK, lanes, (y + top, x + left, width), line, rows, columns)
        k, v = load_keys(K, V, K0, V0, strides_k, strides_v, image, head, keys[2], keys[3], keys[4], D, BLOCK_D)
        _, _, _, ds = differentiate(
            Q, Bias, Grad, Lse, Delta, Inverse, strides_q, strides_g, image, head, heads, token, queries, inside,
            lengths, k, v, keys, table, scale, D, WH, WW, BLOCK_D, PRECISION,
        )  # fmt: skip
        pairs += ds
    place = (group * heads + head).to(tl.int64) * BLOCK + lanes
    tl.store(DPairs + (place * (parts * BLOCK))[:, None] + (part * BLOCK + lanes)[None, :], pairs)
