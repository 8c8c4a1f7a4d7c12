"""Channel attention as Triton kernels: matmuls over all tokens, and a small matrix applied to every token.

Between the two, the sums of the groups become an attention matrix, or the gradients of its logits, row by row: these
kernels treat a tensor (B, heads, D, D) as B * heads * D rows of D elements.
"""

import triton
from triton import language as tl

from ..launching import FORWARD, SMALL, tuned
from ..tiles import load_tokens, offset, store_tokens, wide

SIZES = ("images", "share", "pitch", "tiles", "heads", "H", "W", "groups", "rows")  # arguments that change with the map
TOGETHER = tl.constexpr(16)  # groups that are loaded at a time: small batches have many


@tuned(SIZES, FORWARD)
def gram_kernel(
    X, Y, Sums, strides_x, strides_y, images, share, heads, H, W,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of x[t, i] y[t, j] over `share` tiles of tokens of one head, into (groups, B, heads, D, D)."""
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    image, group = rest % images, rest // images
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for tile in range(group * share, group * share + share):
        token = tile * BLOCK + tl.arange(0, BLOCK)
        inside, y, x = token < H * W, token // W, token % W
        first = load_tokens(X, offset(strides_x, image, head, y, x), strides_x, inside, D, BLOCK_D)
        second = load_tokens(Y, offset(strides_y, image, head, y, x), strides_y, inside, D, BLOCK_D)
        total += tl.dot(tl.trans(first), second, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    place = ((group * images + image) * heads + head).to(tl.int64) * (D * D) + d[:, None] * D + d[None, :]
    tl.store(Sums + place, total, mask=(d < D)[:, None] & (d < D)[None, :])


@tuned(SIZES, FORWARD)
def mix_kernel(
    X, Matrix, Out, strides_x, strides_m, pitch, tiles, heads, H, W,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, i] = sum_j x[t, j] matrix[j, i] for one tile of tokens of one head."""
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    tile, image = rest % tiles, rest // tiles
    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token < H * W
    x = load_tokens(X, offset(strides_x, image, head, token // W, token % W), strides_x, inside, D, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    place = (
        image.to(tl.int64) * strides_m[0] + head * strides_m[1] + d[:, None] * strides_m[2] + d[None, :] * strides_m[3]
    )
    matrix = tl.load(Matrix + place, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0)
    if X.dtype.element_ty == tl.float16:
        # gradients of logits are sums over all tokens times scale: many of them overflow, or are subnormal, in float16
        largest = tl.max(tl.abs(matrix))
        largest = tl.where(largest > 0.0, largest, 1.0)
        mixed = tl.dot(x, (matrix / largest).to(x.dtype), input_precision=PRECISION) * largest
    else:
        mixed = tl.dot(x, matrix.to(x.dtype), input_precision=PRECISION)
    number = image.to(tl.int64) * H * W, wide(token, strides_x[5])
    store_tokens(Out, number, head, pitch, inside, mixed, D, BLOCK_D)


@triton.jit
def rows_of(rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of the elements of this program's rows, row after row: (ROWS * BLOCK_D,).

    They are flat so that threads are distributed over the elements, not the groups: each sums its own in registers.
    """
    number = tl.arange(0, ROWS * BLOCK_D)
    row, d = tl.program_id(0) * ROWS + number // BLOCK_D, number % BLOCK_D
    return row.to(tl.int64) * D + d, (row < rows) & (d < D)


@triton.jit
def sum_groups(Sums, place, known, groups, rows, D: tl.constexpr):
    """(N,): the sum over groups of what gram_kernel wrote to (groups, B, heads, D, D); zeros where not known."""
    # large batches have a single group, and then nothing else is loaded
    total = tl.load(Sums + place, mask=known, other=0.0)
    for first in range(1, groups, TOGETHER):
        group = first + tl.arange(0, TOGETHER)
        start = group.to(tl.int64) * rows * D
        there = (group < groups)[:, None] & known[None, :]
        total += tl.sum(tl.load(Sums + (start[:, None] + place[None, :]), mask=there, other=0.0), 0)
    return total


@tuned(SIZES, SMALL)
def attention_kernel(
    Sums, Attention, groups, rows, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The softmax of each row of scale times the sum over Sums (groups, B, heads, D, D)."""
    place, known = rows_of(rows, D, ROWS, BLOCK_D)
    logits = (sum_groups(Sums, place, known, groups, rows, D) * scale).reshape(ROWS, BLOCK_D)
    logits = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], logits, float("-inf"))  # lanes from D on have logit 0
    logits = tl.exp(logits - tl.max(logits, 1)[:, None])
    logits /= tl.sum(logits, 1)[:, None]
    tl.store(Attention + place, logits.reshape(ROWS * BLOCK_D), mask=known)


@tuned(SIZES, SMALL)
def change_kernel(
    Sums, Attention, Logits, groups, rows, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits, times scale, from those of the attention: the sum over Sums (groups, B, heads, D, D)."""
    place, known = rows_of(rows, D, ROWS, BLOCK_D)
    change = sum_groups(Sums, place, known, groups, rows, D).reshape(ROWS, BLOCK_D)
    attention = tl.load(Attention + place, mask=known, other=0.0).reshape(ROWS, BLOCK_D)
    change -= tl.sum(change * attention, 1)[:, None]
    tl.store(Logits + place, (attention * change * scale).reshape(ROWS * BLOCK_D), mask=known)
