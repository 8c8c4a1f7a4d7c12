"""Neighborhood attention with Triton: launches the kernels and registers them as a torch operator.

If each line is one window, the op is window attention on a grid, and that op's kernels run.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..dispatch import like_maps, under_autocast
from ..launching import launch, power_of_two
from ..packing import apart, as_given
from ..precision import precision
from ..registration import register
from ..tiles import contiguous, outputs, outside_gradients, strides, table_gradient
from ..window_attention import triton_path as windows
from . import reference
from .kernels import backward_bias_kernel, backward_keys_kernel, backward_queries_kernel, forward_kernel

BLOCK = 64  # lanes of queries, and of keys, in one matmul
WIDTH = 8  # columns of a tile
HEIGHTS = (8, 7, 6, 5, 4)  # rows of a tile: one of these
PROGRAMS = 1024  # about how many share a sum over all tiles: a few for each multiprocessor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    outside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.neighborhood_attention`, pairs for both axes."""
    q, k, v = under_autocast(q, k, v)
    bias, k0, v0 = like_maps(k, bias, *((None, None) if outside is None else outside))
    return operator(q, k, v, bias, k0, v0, list(window), list(dilation), scale)[0]


@dataclass(frozen=True)
class Axis:
    """How one axis is cut: `size` pixels, `extended` including those outside, lines in tiles of `tile` tokens."""

    size: int
    extended: int
    window: int
    dilation: int
    tile: int

    def tiles(self, pixels: int) -> int:
        return -(-pixels // (self.dilation * self.tile))

    def span(self) -> tuple[int, int]:
        """The first key that any tile needs, relative to its first query, and the number of keys up to the last."""
        found = []
        for length in {self.extended // self.dilation, -(-self.extended // self.dilation)}:
            for top in range(0, length, self.tile):
                start, end = (
                    min(max(query - self.window // 2, 0), length - self.window)
                    for query in (top, min(top + self.tile, length) - 1)
                )
                found.append((start - top, end + self.window - top))
        first = min(start for start, _ in found)
        return first, max(end for _, end in found) - first


def cut(size: tuple[int, int], window: tuple[int, int], dilation: tuple[int, int]) -> tuple[Axis, Axis]:
    """Rows and columns. The height of a tile minimises the number of blocks of keys; of equal heights, the largest."""
    # larger dilations are equivalent: a line has one position of the map, and its other neighbors are outside
    dh, dw = min(dilation[0], size[0]), min(dilation[1], size[1])
    extended = max(size[0], window[0] * dh), max(size[1], window[1] * dw)
    lengths = -(-extended[0] // dh), -(-extended[1] // dw)
    width = min(WIDTH + window[1] - 1, lengths[1])

    def blocks(tile: int) -> int:
        return -(-lengths[0] // tile) * -(-min(tile + window[0] - 1, lengths[0]) * width // BLOCK)

    rows = Axis(size[0], extended[0], window[0], dh, min(HEIGHTS, key=blocks))
    return rows, Axis(size[1], extended[1], window[1], dw, WIDTH)


class Plan:
    """How calls of one kind are divided into programs, and the arguments that all their kernels share."""

    def __init__(self, k: torch.Size, window: tuple[int, int], dilation: tuple[int, int], precision: str) -> None:
        self.images, H, W, self.heads, D = k
        self.rows, self.columns = axes = cut((H, W), window, dilation)
        self.one_window = all(-(-axis.size // axis.window) == axis.dilation for axis in axes)
        self.outside = any(axis.extended > axis.size for axis in axes)
        self.queries, self.keys = self.tiles(), self.tiles(keys=True)
        self.around = self.rows.span(), self.columns.span()
        self.constants = dict(
            D=D,
            WH=window[0],
            WW=window[1],
            TW=WIDTH,
            BLOCK=BLOCK,
            BLOCK_D=max(power_of_two(D), 16),
            PRECISION=precision,
        )

    def tiles(self, keys: bool = False) -> tuple[int, ...]:
        """The number of tiles of queries, or of keys, and the five numbers per axis that kernels take."""
        total, told = self.images, []
        for axis in (self.rows, self.columns):
            count = axis.tiles(axis.extended if keys else axis.size)
            told += [axis.size, axis.dilation, axis.extended, axis.tile, count]
            total *= axis.dilation * count
        return total, *told


plan_of = lru_cache(maxsize=1024)(Plan)  # models make few kinds of calls, each many times


def forward(q, k, v, bias, k0, v0, window, dilation, scale):
    plan = plan_of(k.shape, tuple(window), tuple(dilation), precision(k.dtype))
    if plan.one_window:
        return windows.forward(q, k, v, bias, k0, v0, window, True, scale)
    out, lse = outputs(q, k, v)
    total, *axes = plan.queries
    tables = contiguous(bias, *((k0, v0) if plan.outside else (None, None)))
    last = (*tables, out, lse, *strides(q, k, v), plan.heads, *axes, scale)
    launch(forward_kernel, total * plan.heads, q, k, v, *last, **plan.constants)
    return out, lse


def backward(grad, q, k, v, bias, k0, v0, window, dilation, scale, out, lse, lay=apart, table=True):
    plan = plan_of(k.shape, tuple(window), tuple(dilation), precision(k.dtype))
    if plan.one_window:
        return windows.backward(grad, q, k, v, bias, k0, v0, window, True, scale, out, lse, lay, table)
    tables = contiguous(bias, *((k0, v0) if plan.outside else (None, None)))
    given, steps = (q, k, v, *tables, grad), strides(q, k, v, grad)
    (dq, dk, dv), (pitch_q, pitch, _) = lay(q, k, v)
    delta = lse.new_empty(lse.shape)
    # large logits: lse is rounded, and by it alone a row's probabilities would not sum to 1
    inverse = lse.new_empty(lse.shape) if q.dtype == torch.float32 else None
    total, *axes = plan.queries
    last = (out, lse, dq, delta, inverse, *steps, pitch_q, plan.heads, *axes, scale)
    launch(backward_queries_kernel, total * plan.heads, *given, *last, **plan.constants)
    total, *axes = plan.keys
    outside = lse.new_empty((total, plan.heads, 2, k.shape[4])) if plan.outside else None
    last = (lse, delta, inverse, dk, dv, outside, *steps, pitch, plan.heads, *axes, scale)
    launch(backward_keys_kernel, total * plan.heads, *given, *last, **plan.constants)
    dbias = None
    if bias is not None and table:
        dbias = bias_gradient(plan, bias, given, steps, (lse, delta, inverse), scale)
    return dq, dk, dv, dbias, *outside_gradients(outside, k0, v0)


def bias_gradient(plan: Plan, bias: Tensor, given: tuple, steps: list, rows: tuple, scale: float) -> Tensor:
    """The gradient of the table (heads, 2*wh - 1, 2*ww - 1), in its dtype."""
    (top, height), (left, width) = plan.around
    parts = -(-height * width // BLOCK)
    total, *axes = plan.queries
    share = max(-(-total // max(PROGRAMS // (plan.heads * parts), 1)), 1)
    groups = -(-total // share)
    pairs = rows[0].new_empty((groups, plan.heads, BLOCK, parts * BLOCK))
    last = (*rows, pairs, *steps, top, left, width, parts, total, share, plan.heads, *axes, scale)
    launch(backward_bias_kernel, groups * parts * plan.heads, *given, *last, **plan.constants)
    return table_gradient(pairs, bias, (plan.rows.tile, WIDTH), (top, left, height, width))


def specification(q, k, v, bias, k0, v0, window, dilation, scale):
    outside = None if k0 is None else (k0, v0)
    return reference.attend(q, k, v, bias, tuple(window), tuple(dilation), scale, outside)


operator = register(
    "neighborhood_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? k0, Tensor? v0, int[] window, int[] dilation, float scale",
    outputs=outputs,
    forward=forward,
    backward=backward,
    as_given=lambda needed, *given: backward(*given, lay=as_given, table=needed[3]),
    specification=specification,
)
