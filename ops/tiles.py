"""What the kernels of several ops share: reading tokens through strides, and gradients of tables of positions."""

import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # softmax is in base 2: exp2 is what the hardware has


@triton.jit
def offset(strides, image, head, y, x):
    """Where the first channel of pixels (y, x) lies; in 64 bits, since a map may have more than 2**31 elements."""
    start = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    return start + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]


@triton.jit
def load_tokens(X, start, strides, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, BLOCK_D): the channels of the tokens that start at `start` (N,); zeros where not inside and from D on."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(X + start[:, None] + d[None, :] * strides[4], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tokens(X, token, head, heads, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes (N, BLOCK_D) to the tokens, numbered over all images, of a contiguous (B, H, W, heads, D)."""
    d = tl.arange(0, BLOCK_D)
    place = (token * heads + head)[:, None] * D + d[None, :]
    tl.store(X + place, value.to(X.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def load_channels(X, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_D,): a head of a contiguous (heads, D), zeros from D on."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(X + head * D + d, mask=d < D, other=0.0)


@triton.jit
def look_up(table, entry):
    """Entries (M, N) of a vector. They come from shared memory, in the layout that a product of matrices leaves.

    Loaded by pointers they would take 64 bits each, and a layout of their own that all of the softmax had to follow.
    """
    return tl.gather(table, entry.reshape(entry.numel), 0).reshape(entry.shape)


def collect_table(pairs: Tensor, rows: int, columns: int) -> Tensor:
    """The gradient of a table of relative positions from the gradients of logits, summed over everything else.

    pairs    (heads, a, c, b, d): query in row a and column c of a tile, key in row b and column d
    returns  (heads, a + b - 1, c + d - 1) cut to the `rows` and `columns` in its middle; entry (b - a, d - c) counted
             from the last query. It is a sum along diagonals, in a fixed order and without atomics
    """
    sums = diagonals(pairs.flip(1).permute(0, 2, 4, 1, 3))  # (heads, c, d, a + b - 1)
    sums = diagonals(sums.permute(0, 3, 1, 2).flip(2))  # (heads, a + b - 1, c + d - 1)
    top, left = (sums.shape[1] - rows) // 2, (sums.shape[2] - columns) // 2
    return sums[:, top : top + rows, left : left + columns]


def diagonals(x: Tensor) -> Tensor:
    """(..., n, m) -> (..., n + m - 1): the sums of x[..., i, j] with equal i + j."""
    n, m = x.shape[-2:]
    # rows of n + m entries read as rows of one less: each row moves one further to the right than the one before
    skewed = F.pad(x, [0, n]).flatten(-2)[..., : n * (n + m - 1)]
    return skewed.unflatten(-1, (n, n + m - 1)).sum(-2)
