"""Token reallocation with Triton: launches the kernels and registers them as torch operators."""

from itertools import accumulate
from math import gcd

import torch
from torch import Tensor

from ..dispatch import under_autocast
from ..launching import launch, power_of_two
from ..precision import precision
from ..registration import register
from ..tiles import strides
from . import reference
from .kernels import (
    backward_tokens_kernel,
    backward_weight_kernel,
    merge_kernel,
    normalise_kernel,
    receive_kernel,
    receive_window_kernel,
)
from .ranking import count_kernel, lay_kernel, number_kernel, sort_kernel

TILE = 64  # tokens of a tile
MEMBERS, CHANNELS = 16, 64  # tokens of a run, and channels, at a time, at most
SORTED = 1024  # tokens that one program sorts at most: for 3,136 it took several times as long as torch
# Pairs of tokens, of all images, up to which places are counted; for more torch sorts. Compiled for sm_90, a pair takes
# 13 instructions: the limit is an estimate from these, and has not been timed.
COUNTED = 2**26
RANKED, OTHERS = 16, 128  # tokens that a program places, and that they are compared with at a time
LANES = 1024  # of a program with one value per lane
PROGRAMS = 1024  # about how many share the sums over all queries, or runs: a few for each multiprocessor


def received(q: Tensor, k: Tensor, window: tuple[int, int] | None, scale: float) -> Tensor:
    """(B, h, w) in float32; the arguments are those of `ops.significance`."""
    return significance(*under_autocast(q, k), [] if window is None else list(window), scale)


def merge(x: Tensor, order: Tensor, weights: list[Tensor], biases: list[Tensor], shares: list[int]) -> Tensor:
    """(B, 2, M, C), for both orders; the arguments are those of `ops.reallocate_tokens`."""
    runs = [weight.numel() for weight in weights]
    flat = torch.cat([weight.flatten() for weight in weights])
    return merged(x, order, flat, torch.cat([bias.flatten() for bias in biases]), runs, shares)


def significance_outputs(q: Tensor, k: Tensor, window: list[int], scale: float) -> tuple[Tensor]:
    """The attention that each key receives (B, h, w), in float32."""
    return (k.new_empty(k.shape[:3], dtype=torch.float32),)


def significance_forward(q, k, window, scale):
    if window:
        return (received_in_windows(q, k, window, scale),)
    B, H, W, heads, D = q.shape
    keys, parts = k.shape[1] * k.shape[2], -(-H * W // TILE)
    lse = q.new_empty((B, heads, H * W), dtype=torch.float32)
    tiles = dict(D=D, BLOCK=TILE, BLOCK_D=max(power_of_two(D), 16), PRECISION=precision(q.dtype))
    sizes, steps = (heads, H, W), strides(q, k)
    launch(normalise_kernel, B * heads * parts, q, k, lse, *steps, keys, k.shape[2], parts, *sizes, scale, **tiles)
    tiles_of_keys = -(-keys // TILE)
    share = -(-parts // max(PROGRAMS // max(B * tiles_of_keys, 1), 1))
    groups = -(-parts // share)
    sums = q.new_empty((groups, B, keys), dtype=torch.float32)
    last = (*steps, keys, k.shape[2], tiles_of_keys, B, share, *sizes, scale)
    launch(receive_kernel, groups * B * tiles_of_keys, q, k, lse, sums, *last, **tiles)
    return ((sums.sum(0) / (heads * H * W)).view(k.shape[:3]),)


def received_in_windows(q: Tensor, k: Tensor, window: list[int], scale: float) -> Tensor:
    """(B, H, W): a window is one tile."""
    B, H, W, heads, D = q.shape
    wh, ww = window
    columns, windows = -(-W // ww), -(-H // wh) * -(-W // ww)
    out = q.new_empty((B, H, W), dtype=torch.float32)
    tiles = dict(BLOCK_N=max(power_of_two(wh * ww), 16), BLOCK_D=max(power_of_two(D), 16))
    given = (q, k, out, *strides(q, k), columns, windows, heads, H, W, scale)
    launch(receive_window_kernel, B * windows, *given, D=D, WH=wh, WW=ww, **tiles, PRECISION=precision(q.dtype))
    return out


def ranked_outputs(significance: Tensor) -> tuple[Tensor]:
    """Pixel indices in both orders (B, 2, H * W)."""
    B, H, W = significance.shape
    return (significance.new_empty((B, 2, H * W), dtype=torch.int64),)


def ranked_forward(significance):
    B, H, W = significance.shape
    if significance.numel() == 0:
        return ranked_outputs(significance)
    (steps,) = strides(significance)
    if H * W <= SORTED:
        (out,) = ranked_outputs(significance)
        launch(sort_kernel, B * 2, significance, out, *steps, H, W, BLOCK=max(power_of_two(H * W), 16))
        return (out,)
    if B * (H * W) ** 2 <= COUNTED:
        (out,), blocks = ranked_outputs(significance), -(-H * W // RANKED)
        given = (significance, out, *steps, blocks, H, W)
        launch(count_kernel, B * blocks, *given, BLOCK=RANKED, OTHERS=OTHERS)
        return (out,)
    laid, blocks = significance.new_empty((B, 2, H * W)), -(-H * W // LANES)
    launch(lay_kernel, B * 2 * blocks, significance, laid, *steps, blocks, H, W, BLOCK=LANES)
    order = reference.ascending(laid).contiguous()
    launch(number_kernel, B * blocks, order, blocks, H, W, BLOCK=LANES)
    return (order,)


def runs_of(tokens: int, runs: list[int], shares: list[int]) -> list[int]:
    """The number of runs in each group."""
    found, first = [], 0
    for run, end in zip(runs, accumulate(shares), strict=True):
        last = tokens * end // sum(shares)
        found.append(-((first - last) // run))
        first = last
    return found


def ends_of(tokens: int, shares: list[int]) -> tuple[int | None, ...]:
    """The cumulative sums of the shares, followed by 1 if their products with `tokens` need 64 bits, else None."""
    part = gcd(*shares)
    sums = [total // part for total in accumulate(shares)]
    return (*sums, 1 if tokens * sums[-1] >= 2**31 else None)


def merged_outputs(
    x: Tensor, order: Tensor, weights: Tensor, biases: Tensor, runs: list[int], shares: list[int]
) -> tuple[Tensor]:
    """The runs of all groups in both orders (B, 2, M, C)."""
    return (x.new_empty((x.shape[0], 2, sum(runs_of(x.shape[1] * x.shape[2], runs, shares)), x.shape[3])),)


def merged_forward(x, order, weights, biases, runs, shares):
    (out,) = merged_outputs(x, order, weights, biases, runs, shares)
    B, H, W, C = x.shape
    tile = tile_of(runs)
    tiles = sum(-(-count // tile["RUNS"]) for count in runs_of(H * W, runs, shares))
    groups = (tuple(runs), ends_of(H * W, shares))
    given = (x, order, weights, biases, out, *strides(x), *order.stride(), *groups)
    if programs := B * 2 * tiles * -(-C // CHANNELS):
        launch(merge_kernel, programs, *given, B, out.shape[2], H, W, C, **tile)
    return (out,)


def merged_backward(grad, x, order, weights, biases, runs, shares, out):
    B, H, W, C = x.shape
    rank = torch.zeros_like(order, memory_format=torch.contiguous_format)  # an index, even if `order` repeats some
    rank.scatter_(2, order, torch.arange(H * W, device=x.device).expand_as(order))
    dx, tiles, groups = x.new_empty(x.shape), -(-H * W // TILE), (tuple(runs), ends_of(H * W, shares))
    given = (rank, weights.contiguous(), grad, dx, *strides(grad), *groups)
    blocks = dict(BLOCK=TILE, BLOCK_C=CHANNELS)
    launch(backward_tokens_kernel, B * tiles * -(-C // CHANNELS), *given, tiles, H, W, C, GROUPS=len(runs), **blocks)
    tile = tile_of(runs)
    parts = sum(-(-run // tile["MEMBERS"]) for run in runs)
    most = max(-(-count // tile["RUNS"]) for count in runs_of(H * W, runs, shares))
    # where images are few, several programs share the runs of each
    sections = max(min(PROGRAMS // max(B * 2 * parts, 1), most), 1)
    sums = x.new_empty((B * 2 * sections, sum(runs) + len(runs)), dtype=torch.float32)
    steps_x, steps_g = strides(x, grad)
    given = (x, order, grad, sums, steps_x, *order.stride(), steps_g, *groups, parts, sections, H, W, C)
    if B:
        launch(backward_weight_kernel, B * 2 * sections * parts, *given, **tile)
    dweights, dbiases = sums.sum(0).split([sum(runs), len(runs)])
    # copies: an operator may not return parts of one tensor
    return dx, None, dweights.to(weights.dtype, copy=True), dbiases.to(biases.dtype, copy=True)


def tile_of(runs: list[int]) -> dict[str, int]:
    """The number of runs in a tile and of members of each at a time, which are the same for all groups of a launch.

    Lanes beyond the end of a shorter run are masked.
    """
    members = min(power_of_two(max(runs)), MEMBERS)
    return dict(GROUPS=len(runs), RUNS=TILE // members, MEMBERS=members, BLOCK_C=CHANNELS)


def merged_specification(x, order, weights, biases, runs, shares):
    lists = (list(weights.split(runs)), list(biases.split(1)), shares)
    return torch.stack([reference.merge(x, order[:, i], *lists) for i in range(2)], 1)


significance = register(
    "significance",
    "Tensor q, Tensor k, int[] window, float scale",
    outputs=significance_outputs,
    forward=significance_forward,
    backward=None,
    specification=lambda q, k, window, scale: reference.received(q, k, tuple(window) if window else None, scale),
    results=1,
)
ranked = register(
    "ranked_tokens",
    "Tensor significance",
    outputs=ranked_outputs,
    forward=ranked_forward,
    backward=None,
    specification=reference.rank,
    results=1,
)
merged = register(
    "merged_tokens",
    "Tensor x, Tensor order, Tensor weights, Tensor biases, int[] runs, int[] shares",
    outputs=merged_outputs,
    forward=merged_forward,
    backward=merged_backward,
    specification=merged_specification,
    results=1,
    reads_result=lambda *args: False,
)
