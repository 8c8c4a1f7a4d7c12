"""Ranking as Triton kernels: few tokens are sorted by one program per order, more are each compared with all others.

Where those would be too many comparisons, torch sorts between two kernels.
"""

import triton
from triton import language as tl

from ..launching import Choices, choice, tuned
from ..tiles import wide

# arguments that change with the map, its strides included: no layout of it lets a thread load several values at once
SIZES = ("H", "W", "blocks", "image_step", "row_step", "column_step")
# two orders of a few images do not fill a GPU: programs have many threads, and there is nothing to tune
MANY = Choices(half=(choice(16, 1),), float32=(choice(16, 1),))
ONE_EACH = Choices(half=(choice(4, 1),), float32=(choice(4, 1),))


@triton.jit
def load_values(Values, strides, image, order, lane, H, W):
    """The values of an image in row-major (order 0) or column-major (1) order; 0 after the last."""
    y, x = tl.where(order == 0, lane // W, lane % H), tl.where(order == 0, lane % W, lane // H)
    place = wide(y, strides[3]) * strides[1] + wide(x, strides[3]) * strides[2]
    return tl.load(Values + image.to(tl.int64) * strides[0] + place, mask=lane < H * W, other=0.0)


@triton.jit
def pixel(number, order, H, W):
    """The row-major index of a pixel from its index in an order."""
    return tl.where(order == 0, number, number % H * W + number // H)


@triton.jit
def ordered(value, known):
    """Integers in the order of the values, in the upper half of 64 bits: NaN comes after them, what is not known last.

    With an index in the lower half no two are equal, so any sort of them is stable.
    """
    value = value.to(tl.float32) + 0.0  # turns -0 into 0, which it equals
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of negative values grow as the values fall
    bits = tl.where(value != value, 0x7FFFFFFE, bits)
    return tl.where(known, bits, 0x7FFFFFFF).to(tl.int64) << 32


@tuned(SIZES, MANY)
def sort_kernel(Values, Out, image_step, row_step, column_step, far, H, W, BLOCK: tl.constexpr):
    """Pixels of one image by value, ties in the given order, NaN last; Out (B, 2, H * W) is contiguous."""
    strides = image_step, row_step, column_step, far
    order, image = tl.program_id(0) % 2, tl.program_id(0) // 2
    lane = tl.arange(0, BLOCK)
    value = load_values(Values, strides, image, order, lane, H, W)
    ranked = (tl.sort(ordered(value, lane < H * W) | lane) & 0xFFFFFFFF).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * (H * W)
    tl.store(Out + start + lane, pixel(ranked, order, H, W).to(tl.int64), mask=lane < H * W)


@triton.jit
def keys(Values, strides, image, lane, H, W):
    """The keys of pixels, given by their row-major indices, in both orders."""
    bits = ordered(load_values(Values, strides, image, 0, lane, H, W), lane < H * W)
    return bits | lane, bits | pixel(lane, 1, W, H)  # with rows and columns swapped, this is a column-major index


@tuned(SIZES, ONE_EACH)
def count_kernel(
    Values, Out, image_step, row_step, column_step, far, blocks, H, W, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """What `sort_kernel` stores, by counting: the place of a pixel in an order is the number of smaller keys.

    A program places a block of pixels of one image in both orders. No two pixels have the same place.
    """
    strides = image_step, row_step, column_step, far
    block, image = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    lane = block * BLOCK + tl.arange(0, BLOCK)
    by_rows, by_columns = keys(Values, strides, image, lane, H, W)
    # summed at the end: each thread counts for itself
    rows, columns = tl.zeros([BLOCK, OTHERS], tl.int32), tl.zeros([BLOCK, OTHERS], tl.int32)
    for first in range(0, H * W, OTHERS):
        other_by_rows, other_by_columns = keys(Values, strides, image, first + tl.arange(0, OTHERS), H, W)
        rows += (other_by_rows[None, :] < by_rows[:, None]).to(tl.int32)
        columns += (other_by_columns[None, :] < by_columns[:, None]).to(tl.int32)
    start = Out + image.to(tl.int64) * 2 * (H * W)
    tl.store(start + tl.sum(rows, 1), lane.to(tl.int64), mask=lane < H * W)
    tl.store(start + H * W + tl.sum(columns, 1), lane.to(tl.int64), mask=lane < H * W)


@tuned(SIZES, ONE_EACH)
def lay_kernel(Values, Out, image_step, row_step, column_step, far, blocks, H, W, BLOCK: tl.constexpr):
    """Out (B, 2, H * W), contiguous: the values of each image in both orders."""
    strides = image_step, row_step, column_step, far
    block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    lane = block * BLOCK + tl.arange(0, BLOCK)
    value = load_values(Values, strides, row // 2, row % 2, lane, H, W)
    tl.store(Out + row.to(tl.int64) * (H * W) + lane, value, mask=lane < H * W)


@tuned(SIZES, ONE_EACH)
def number_kernel(Order, blocks, H, W, BLOCK: tl.constexpr):
    """Converts column-major indices in Order[:, 1] (B, 2, H * W), contiguous, to row-major indices."""
    block, image = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    lane = block * BLOCK + tl.arange(0, BLOCK)
    place = Order + (image.to(tl.int64) * 2 + 1) * (H * W) + lane
    number = tl.load(place, mask=lane < H * W, other=0).to(tl.int32)  # a 64-bit division calls a subroutine
    tl.store(place, pixel(number, 1, H, W).to(tl.int64), mask=lane < H * W)
