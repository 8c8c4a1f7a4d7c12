"""Ranking as Triton kernels: few tokens are sorted by one program per order, many by torch between two kernels."""

import triton
from triton import language as tl

from ..launching import Choices, choice, tuned
from ..tiles import wide

SIZES = ("H", "W", "blocks")  # arguments that change with the map
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


@tuned(SIZES, MANY)
def sort_kernel(Values, Out, strides, H, W, BLOCK: tl.constexpr):
    """Pixels of one image by value, ties in the given order, NaN last; Out (B, 2, H * W) is contiguous.

    The keys are 64-bit integers: the value's bits, mapped to integers in the same order, in the upper half, and its
    index in the lower half. No two keys are equal, so any sort is stable.
    """
    order, image = tl.program_id(0) % 2, tl.program_id(0) // 2
    lane = tl.arange(0, BLOCK)
    # adding 0 turns -0 into 0, which it equals
    value = load_values(Values, strides, image, order, lane, H, W).to(tl.float32) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of negative values grow as the values fall
    bits = tl.where(value != value, 0x7FFFFFFE, bits)
    bits = tl.where(lane < H * W, bits, 0x7FFFFFFF)
    ranked = (tl.sort((bits.to(tl.int64) << 32) | lane.to(tl.int64)) & 0xFFFFFFFF).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * (H * W)
    tl.store(Out + start + lane, pixel(ranked, order, H, W).to(tl.int64), mask=lane < H * W)


@tuned(SIZES, ONE_EACH)
def lay_kernel(Values, Out, strides, blocks, H, W, BLOCK: tl.constexpr):
    """Out (B, 2, H * W), contiguous: the values of each image in both orders."""
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
