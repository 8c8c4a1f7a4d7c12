"""Code shared by the kernels of several ops: access to tokens, what attention returns, and gradients."""

from functools import lru_cache
from math import prod
from typing import Any

import triton
from torch import Tensor, float32, zeros_like
from triton import language as tl

from .launching import Choices, choice, launch, tuned

ENTRIES = 64  # of a table, summed by one program
LOG2E = tl.constexpr(1.4426950408889634)  # softmax is in base 2: the hardware has exp2


def strides(*maps: Tensor) -> list[tuple[int | None, ...]]:
    """The strides of maps (B, H, W, ...) as kernels take them, followed by 1 if offsets need 64 bits, else None.

    If an image of one map is `far_spread`, all maps get the 1. With 32-bit offsets the window kernels have a tenth
    fewer instructions on sm_90 and a quarter fewer registers, so more programs run at a time.
    """
    spread = any(far_spread(t.shape, t.stride()) for t in maps)
    return [(*t.stride(), 1 if spread else None) for t in maps]


@lru_cache(maxsize=4096)
def far_spread(shape: tuple[int, ...], steps: tuple[int, ...]) -> bool:
    """Whether offsets within an image may reach 2**31, in the map itself or in a packed map of three like it."""
    span = sum((n - 1) * step for n, step in zip(shape[1:], steps[1:], strict=True))
    return max(span, 3 * prod(shape[1:])) >= 2**31


@triton.jit
def wide(number, far):
    """An index within an image, in 64 bits where the strides say that offsets need them."""
    if far is None:
        return number
    else:
        return number.to(tl.int64)


@triton.jit
def offset(strides, image, head, y, x):
    """The location of the first channel of pixels (y, x): the start of their image and head, and the offset from it."""
    start = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    return start, wide(y, strides[5]) * strides[1] + wide(x, strides[5]) * strides[2]


@triton.jit
def load_tokens(X, start, strides, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, BLOCK_D): the channels of tokens at their `offset`; zeros where not inside and from channel D on."""
    d = tl.arange(0, BLOCK_D)
    place = start[1][:, None] + (wide(d, strides[5]) * strides[4])[None, :]
    return tl.load(X + start[0] + place, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def at(X, token, head, pitch):
    """Pointers to the values of tokens in (B, H, W, heads), with `pitch` values per token.

    A token is two numbers: the pixels in all images before its own, and the index of its pixel within its image.
    """
    return X + (token[0] * pitch + head) + token[1] * pitch


@triton.jit
def channels_at(X, token, head, pitch, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (N, BLOCK_D) to the channels of tokens in (B, H, W, heads, D) that are `pitch` heads apart.

    The pitch is the number of heads if the map is contiguous, and larger if it is part of a packed map.
    """
    return X + (token[0] * pitch + head) * D + ((token[1] * (pitch * D))[:, None] + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_stored(X, token, head, pitch, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, BLOCK_D): what `store_tokens` wrote; zeros where not inside and from channel D on."""
    known = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(channels_at(X, token, head, pitch, D, BLOCK_D), mask=known, other=0.0)


@triton.jit
def store_tokens(X, token, head, pitch, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes (N, BLOCK_D) to the pointers of `channels_at`."""
    known = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(channels_at(X, token, head, pitch, D, BLOCK_D), value.to(X.dtype.element_ty), mask=known)


@triton.jit
def load_channels(X, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_D,): a head of a contiguous (heads, D), zeros from channel D on."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(X + head * D + d, mask=d < D, other=0.0)


@triton.jit
def load_keys(
    K, V, K0, V0, strides_k, strides_v, image, head, y, x, inside, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The keys and values of a tile; K0 and V0 replace those that are not inside."""
    k = load_tokens(K, offset(strides_k, image, head, y, x), strides_k, inside, D, BLOCK_D)
    v = load_tokens(V, offset(strides_v, image, head, y, x), strides_v, inside, D, BLOCK_D)
    if K0 is not None:
        k = tl.where(inside[:, None], k, load_channels(K0, head, D, BLOCK_D).to(k.dtype)[None, :])
        v = tl.where(inside[:, None], v, load_channels(V0, head, D, BLOCK_D).to(v.dtype)[None, :])
    return k, v


@triton.jit
def look_up(table, entry):
    """Entries (M, N) of a vector, gathered from shared memory in the layout of a matmul's result.

    Loading them through pointers would take 64 bits each, and impose a layout of their own on the whole softmax.
    """
    return tl.gather(table, entry.reshape(entry.numel), 0).reshape(entry.shape)


@triton.jit
def balanced(delta, weight, rest):
    """Corrects what a softmax subtracts from the gradients of its probabilities, so that a row's gradients cancel.

    `delta` (N,) was subtracted, and left probabilities that sum to `weight` and gradients that sum to `rest`, which
    differ from 1 and 0 by rounding. K0 occurs many times in a row, so its gradient sums up what should cancel.
    """
    return delta + rest / tl.where(weight == 0.0, 1.0, weight)


SIZES = ("queries", "keys", "count", "padded", "tall", "wide", "top", "left", "height", "width", "rows", "columns")


@tuned(SIZES, Choices(half=(choice(4, 1),), float32=(choice(4, 1),)))
def backward_table_kernel(
    Pairs, Table, queries, keys, count, padded, tall, wide, top, left, height, width, rows, columns, far,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of entries of a head: each is a sum over all pairs of a query and the key at that relative position.

    `far` is 1 if a head has so many pairs that their offsets need 64 bits, else None.
    """
    blocks = tl.cdiv(rows * columns, BLOCK)
    head, entry = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    # the key of a query in row 0 and column 0, in the rectangle of keys
    y, x = entry // columns - rows // 2 - top, entry % columns - columns // 2 - left
    start = Pairs + head.to(tl.int64) * queries * keys
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count * tall * wide, BLOCK):
        query = first + tl.arange(0, BLOCK)
        before, token = query // (tall * wide) * padded, query % (tall * wide)
        row, column = y[None, :] + (token // wide)[:, None], x[None, :] + (token % wide)[:, None]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        inside &= (query < count * tall * wide)[:, None] & (entry < rows * columns)[None, :]
        lane = before + token
        if far is not None:
            lane = lane.to(tl.int64)
        place = lane[:, None] * keys + before[:, None] + row * width + column
        total += tl.sum(tl.load(start + place, mask=inside, other=0.0), 0)
    place = head * (rows * columns) + entry
    tl.store(Table + place, total.to(Table.dtype.element_ty), mask=entry < rows * columns)


def table_gradient(
    pairs: Tensor,
    bias: Tensor,
    queries: tuple[int, int],
    keys: tuple[int, int, int, int],
    count: int = 1,
    padded: int = 0,
) -> Tensor:
    """The gradient of a table of relative positions from the gradients of logits, in the table's dtype.

    pairs    (groups, heads, lanes of queries, lanes of keys), float32, contiguous
    bias     (heads, rows, columns), the table; its centre is the relative position zero
    queries  rows and columns of the rectangle of queries, which are the first lanes
    keys     the rectangle of keys: first row and column relative to the first query, and the number of rows and columns
    count    number of consecutive rectangles, each in `padded` lanes; pairs from two different ones do not count
    returns  (heads, rows, columns): sums along diagonals, in a fixed order and without atomics
    """
    heads, rows, columns = bias.shape
    pairs, out = pairs.sum(0), bias.new_empty(bias.shape)
    far = 1 if pairs.shape[1] * pairs.shape[2] >= 2**31 else None
    given = (pairs, out, *pairs.shape[1:], count, padded, *queries, *keys, rows, columns, far)
    launch(backward_table_kernel, heads * triton.cdiv(rows * columns, ENTRIES), *given, BLOCK=ENTRIES)
    return out


def contiguous(*tables: Tensor | None) -> list[Tensor | None]:
    """Contiguous tables, which kernels read without strides; None stays None."""
    return [None if t is None else t.contiguous() for t in tables]


def outputs(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Empty: the result (B, H, W, heads, D), and the base-2 logarithm of each softmax's sum (B, H, W, heads)."""
    return v.new_empty(v.shape), v.new_empty(v.shape[:4], dtype=float32)


def outside_gradients(parts: Tensor | None, k0: Tensor | None, v0: Tensor | None) -> list[Tensor | None]:
    """(programs, heads, 2, D), or None if nothing is outside -> the gradients of k0 and v0 (heads, D)."""
    given = (k0, v0)
    if parts is None:
        return [None if t is None else zeros_like(t) for t in given]
    return [found.to(t.dtype, copy=True) for found, t in zip(parts.sum(0).unbind(1), given, strict=True)]
