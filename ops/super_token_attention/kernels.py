"""Super tokens as Triton kernels: three matmuls of pixels and the 3 x 3 tokens around their cell.

`relate` computes nine numbers for every pixel, `contribute` and `collect` sum pixels into tokens, `spread` sums tokens
into pixels; each is the gradient of the other two. The nine tokens take 16 lanes. Pixels are read once: each cell
writes its contributions to the tokens around it, and the tokens then gather them. There are no atomics.
"""

import triton
from triton import language as tl

from ..launching import PLAIN, SMALL, tuned
from ..tiles import wide

# arguments that change with the map, the strides of the affinity included: nine shares are no multiple of 16
SIZES = ("H", "W", "h", "w", "count", "image_step", "row_step", "pixel_step", "share_step")


@triton.jit
def locate(cell, part, sizes, CH: tl.constexpr, CW: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows and columns of the pixels of a part of a cell, and whether they are on the map."""
    H, W, _, w = sizes
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    y, x = cell // w * CH + pixel // CW, cell % w * CW + pixel % CW
    return y, x, (pixel < CH * CW) & (y < H) & (x < W)


@triton.jit
def around(cell, sizes):
    """Rows and columns of the 3 x 3 tokens around a cell, in 16 lanes, and whether they are on the grid."""
    _, _, h, w = sizes
    lane = tl.arange(0, 16)
    row, column = cell // w + lane // 3 - 1, cell % w + lane % 3 - 1
    return row, column, (lane < 9) & (row >= 0) & (row < h) & (column >= 0) & (column < w)


@triton.jit
def load_rows(X, strides, image, y, x, known, channel, C):
    """(N, channels) of the pixels or tokens (y, x) of an image; zeros where not known."""
    place = wide(y, strides[4]) * strides[1] + wide(x, strides[4]) * strides[2]
    place = place[:, None] + (wide(channel, strides[4]) * strides[3])[None, :]
    mask = known[:, None] & (channel < C)[None, :]
    return tl.load(X + image.to(tl.int64) * strides[0] + place, mask=mask, other=0.0)


@triton.jit
def place_of(image, y, x, sizes, channel, C, strides):
    """The location of channels of pixels in a contiguous (B, H, W, C): the start of the image and offsets from it."""
    H, W, _, _ = sizes
    return image.to(tl.int64) * H * W * C, (wide(y * W + x, strides[4]) * C)[:, None] + channel[None, :]


@tuned(SIZES, PLAIN)
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
        logits += tl.load(Extra + image.to(tl.int64) * h * w + row * w + column, mask=known, other=0.0)[None, :]
    if SOFTMAX:
        logits = tl.where((lane < 9)[None, :], logits, float("-inf"))  # tokens beyond the grid have logit 0
        logits = tl.exp(logits - tl.max(logits, 1)[:, None])
        logits /= tl.sum(logits, 1)[:, None]
    start, place = place_of(image, y, x, sizes, lane, 9, strides_x)
    tl.store(Out + start + place, logits.to(Out.dtype.element_ty), mask=inside[:, None] & (lane < 9)[None, :])


@tuned(SIZES, SMALL)
def contribute_kernel(
    X, Affinity, Parts, Totals, strides_x, image_step, row_step, pixel_step, share_step, C, H, W, h, w,
    CH: tl.constexpr, CW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pixels of a cell add to the nine tokens around it: sum_i affinity[i, n] x[i].

    Parts (B, h, w, 9, C) and, if given, Totals (B, h, w, 9), the sums of the affinities, are contiguous float32. Pixels
    of a cell that are beyond the map are zeros, shared evenly among the nine tokens, and count in the totals.
    """
    sizes, strides_a = (H, W, h, w), (image_step, row_step, pixel_step, share_step, strides_x[4])
    parts: tl.constexpr = (CH * CW + BLOCK_P - 1) // BLOCK_P
    blocks = tl.cdiv(C, BLOCK_C)
    block, flat = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    cell, image = flat % (h * w), flat // (h * w)
    channel, lane = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, 16)
    sums, total = tl.zeros([16, BLOCK_C], tl.float32), tl.zeros([16], tl.float32)
    for part in range(parts):
        y, x, inside = locate(cell, part, sizes, CH, CW, BLOCK_P)
        pixels = load_rows(X, strides_x, image, y, x, inside, channel, C)
        affinity = load_rows(Affinity, strides_a, image, y, x, inside, lane, 9).to(pixels.dtype)
        sums += tl.dot(tl.trans(affinity), pixels, input_precision=PRECISION)
        total += tl.sum(affinity.to(tl.float32), 0)
    start, mask = flat.to(tl.int64) * 9, (lane < 9)[:, None] & (channel < C)[None, :]
    tl.store(Parts + start * C + ((lane * C)[:, None] + channel[None, :]), sums, mask=mask)
    if Totals is not None:
        on_map = tl.minimum(H - cell // w * CH, CH) * tl.minimum(W - cell % w * CW, CW)
        if block == 0:  # not in the mask, where Triton 3.9's interpreter does not support a scalar
            tl.store(Totals + start + lane, total + (CH * CW - on_map) / 9.0, mask=lane < 9)


@tuned(SIZES, SMALL)
def collect_kernel(
    Parts, Totals, Out, Total, count, C, h, w, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Out[n], the sum of what the 3 x 3 cells around each of `count` tokens contribute; Out (B, h, w, C) is contiguous.

    With Totals it is an average: divided by the sum of the affinities, which Total (B, h, w) receives.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    number, channel = tl.arange(0, BLOCK_T), block * BLOCK_C + tl.arange(0, BLOCK_C)
    first, token = (tile * BLOCK_T).to(tl.int64), tile * BLOCK_T + number
    row, column = token // w % h, token % w
    value, total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for lane in range(9):
        down, right = row + lane // 3 - 1, column + lane % 3 - 1
        known = (token < count) & (down >= 0) & (down < h) & (right >= 0) & (right < w)
        # relative to that cell the token is at the mirrored position
        start, place = (first + (lane // 3 - 1) * w + lane % 3 - 1) * 9 + (8 - lane), number * 9
        mask = known[:, None] & (channel < C)[None, :]
        value += tl.load(Parts + start * C + ((place * C)[:, None] + channel[None, :]), mask=mask, other=0.0)
        if Totals is not None:
            total += tl.load(Totals + start + place, mask=known, other=0.0)
    if Totals is not None:
        value /= (total + 1e-12)[:, None]
        if block == 0:
            tl.store(Total + token, total, mask=token < count)
    place, mask = (number * C)[:, None] + channel[None, :], (token < count)[:, None] & (channel < C)[None, :]
    tl.store(Out + first * C + place, value.to(Out.dtype.element_ty), mask=mask)


@tuned(SIZES, PLAIN)
def spread_kernel(
    Affinity, Tokens, Scale, Out, image_step, row_step, pixel_step, share_step, strides_t, C, H, W, h, w,
    CH: tl.constexpr, CW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out[i] = sum over the nine tokens of affinity[i, n] token[n]; Out (B, H, W, C) is contiguous.

    With Scale (B, h, w), affinities to a token are first multiplied by its scale.
    """
    sizes, strides_a = (H, W, h, w), (image_step, row_step, pixel_step, share_step, strides_t[4])
    parts: tl.constexpr = (CH * CW + BLOCK_P - 1) // BLOCK_P
    blocks = tl.cdiv(C, BLOCK_C)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    part, rest = rest % parts, rest // parts
    cell, image = rest % (h * w), rest // (h * w)
    y, x, inside = locate(cell, part, sizes, CH, CW, BLOCK_P)
    row, column, known = around(cell, sizes)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = load_rows(Tokens, strides_t, image, row, column, known, channel, C)
    affinity = load_rows(Affinity, strides_a, image, y, x, inside, tl.arange(0, 16), 9)
    if Scale is not None:
        affinity *= tl.load(Scale + image.to(tl.int64) * h * w + row * w + column, mask=known, other=0.0)[None, :]
    out = tl.dot(affinity.to(tokens.dtype), tokens, input_precision=PRECISION)
    start, place = place_of(image, y, x, sizes, channel, C, strides_a)
    tl.store(Out + start + place, out.to(Out.dtype.element_ty), mask=inside[:, None] & (channel < C)[None, :])
