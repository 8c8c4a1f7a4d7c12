"""Super tokens as Triton kernels: pixels meet the 3 x 3 tokens around their cell, in three products.

`relate` gives nine numbers to every pixel, `collect` sums pixels into tokens, `spread` sums tokens into pixels; each is
the gradient of the other two. The nine tokens are 16 lanes. Tokens gather their pixels: nothing is added by atomics.
"""

import triton
from triton import language as tl

from ..launching import FORWARD, tuned

SIZES = ("H", "W", "h", "w")  # arguments that change with the map


@triton.jit
def locate(cell, part, sizes, CH: tl.constexpr, CW: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows and columns of the pixels of a part of a cell, and whether they lie on the map."""
    H, W, _, w = sizes
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    y, x = cell // w * CH + pixel // CW, cell % w * CW + pixel % CW
    return y, x, (pixel < CH * CW) & (y < H) & (x < W)


@triton.jit
def around(cell, sizes):
    """Rows and columns of the 3 x 3 tokens around a cell, in 16 lanes, and whether they lie on the grid."""
    _, _, h, w = sizes
    lane = tl.arange(0, 16)
    row, column = cell // w + lane // 3 - 1, cell % w + lane % 3 - 1
    return row, column, (lane < 9) & (row >= 0) & (row < h) & (column >= 0) & (column < w)


@triton.jit
def load_rows(X, strides, image, y, x, known, channel, C):
    """(N, channels) of the pixels or tokens (y, x) of an image; zeros where not known."""
    start = image.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
    place = start[:, None] + channel[None, :] * strides[3]
    return tl.load(X + place, mask=known[:, None] & (channel < C)[None, :], other=0.0)


@tuned(SIZES, FORWARD)
def relate_kernel(
    X, Tokens, Extra, Out, strides_x, strides_t, C, H, W, h, w, scale,
    CH: tl.constexpr, CW: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Out[i, n] = scale * x[i] . token[n] + Extra[n], through a softmax over the nine if SOFTMAX; Out is contiguous."""
    sizes = H, W, h, w
    parts: tl.constexpr = (CH * CW + BLOCK_P - 1) // BLOCK_P
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    cell, image = rest % (h * w), rest // (h * w)
    y, x, inside = locate(cell, part, sizes, CH, CW, BLOCK_P)
    row, column, known = around(cell, sizes)
    logits = tl.zeros([BLOCK_P, 16], tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        pixels = load_rows(X, strides_x, image, y, x, inside, channel, C)
        tokens = load_rows(Tokens, strides_t, image, row, column, known, channel, C)
        logits += tl.dot(pixels, tl.trans(tokens.to(pixels.dtype)), input_precision=PRECISION)
    logits *= scale
    lane = tl.arange(0, 16)
    if Extra is not None:
        place = image.to(tl.int64) * h * w + row * w + column
        logits += tl.load(Extra + place, mask=known, other=0.0)[None, :]
    if SOFTMAX:
        logits = tl.where((lane < 9)[None, :], logits, float("-inf"))  # tokens beyond the grid have logit 0
        logits = tl.exp(logits - tl.max(logits, 1)[:, None])
        logits /= tl.sum(logits, 1)[:, None]
    place = ((image.to(tl.int64) * H + y) * W + x)[:, None] * 9 + lane[None, :]
    tl.store(Out + place, logits.to(Out.dtype.element_ty), mask=inside[:, None] & (lane < 9)[None, :])


@tuned(SIZES, FORWARD)
def collect_kernel(
    X, Affinity, Out, Total, strides_x, strides_a, C, H, W, h, w,
    CH: tl.constexpr, CW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Out[n] = sum_i affinity[i, n] x[i] over the 3 x 3 cells around the token n; Out (B, h, w, C) is contiguous.

    With Total (B, h, w) it is an average: divided by the sum of the affinities, which Total receives. Pixels by which
    cells reach beyond the map are zeros, shared evenly among nine tokens, and count in that sum.
    """
    sizes = H, W, h, w
    parts: tl.constexpr = (CH * CW + BLOCK_P - 1) // BLOCK_P
    blocks = tl.cdiv(C, BLOCK_C)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    token, image = rest % (h * w), rest // (h * w)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    value = tl.zeros([BLOCK_C], tl.float32)
    total = 0.0
    for lane in range(9):
        row, column = token // w + lane // 3 - 1, token % w + lane % 3 - 1
        known = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        for part in range(parts):
            y, x, inside = locate(row * w + column, part, sizes, CH, CW, BLOCK_P)
            inside &= known
            pixels = load_rows(X, strides_x, image, y, x, inside, channel, C)
            # seen from that cell the token lies at the mirrored place
            place = image.to(tl.int64) * strides_a[0] + y.to(tl.int64) * strides_a[1] + x * strides_a[2]
            affinity = tl.load(Affinity + place + (8 - lane) * strides_a[3], mask=inside, other=0.0).to(tl.float32)
            value += tl.sum(affinity[:, None] * pixels.to(tl.float32), 0)
            total += tl.sum(affinity, 0)
        on_map = tl.minimum(H - row * CH, CH) * tl.minimum(W - column * CW, CW)
        total += tl.where(known, (CH * CW - on_map) / 9.0, 0.0)
    token_place = image.to(tl.int64) * h * w + token
    if Total is not None:
        value /= total + 1e-12
        tl.store(Total + token_place, total, mask=block == 0)
    tl.store(Out + token_place * C + channel, value.to(Out.dtype.element_ty), mask=channel < C)


@tuned(SIZES, FORWARD)
def spread_kernel(
    Affinity, Tokens, Out, strides_a, strides_t, C, H, W, h, w,
    CH: tl.constexpr, CW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out[i] = sum over the nine tokens of affinity[i, n] token[n]; Out (B, H, W, C) is contiguous."""
    sizes = H, W, h, w
    parts: tl.constexpr = (CH * CW + BLOCK_P - 1) // BLOCK_P
    blocks = tl.cdiv(C, BLOCK_C)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    part, rest = rest % parts, rest // parts
    cell, image = rest % (h * w), rest // (h * w)
    y, x, inside = locate(cell, part, sizes, CH, CW, BLOCK_P)
    row, column, known = around(cell, sizes)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = load_rows(Tokens, strides_t, image, row, column, known, channel, C)
    affinity = load_rows(Affinity, strides_a, image, y, x, inside, tl.arange(0, 16), 9).to(tokens.dtype)
    out = tl.dot(affinity, tokens, input_precision=PRECISION)
    place = ((image.to(tl.int64) * H + y) * W + x)[:, None] * C + channel[None, :]
    tl.store(Out + place, out.to(Out.dtype.element_ty), mask=inside[:, None] & (channel < C)[None, :])
