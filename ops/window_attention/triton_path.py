"""Window attention with Triton: launches the kernels and registers them as a torch operator."""

from functools import lru_cache

import torch
from torch import Tensor

from ..dispatch import NARROW, like_maps, under_autocast
from ..launching import launch, power_of_two
from ..packing import apart, as_given
from ..precision import precision
from ..registration import register
from ..tiles import contiguous, outputs, outside_gradients, strides, table_gradient
from . import reference
from .kernels import backward_kernel, forward_kernel
from .large import (
    backward_bias_kernel,
    backward_keys_kernel,
    backward_queries_kernel,
    forward_kept_kernel,
    forward_tiles_kernel,
)

TILE = 64  # lanes of queries, and of keys, in one matmul
# About how many programs divide all windows where each sums over its own, or looks up the table once for them. These
# were the fastest of those timed on an H200 (132 multiprocessors): more have less to share, fewer fill it unevenly.
PROGRAMS = {"forward": 1024, "backward": 528, "tiles": 1024, "kept": 528}
KEPT = 3  # whole tiles of keys up to which the table is looked up once for several windows: four do not fit


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    grid: bool,
    scale: float,
    outside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.window_attention`, `grid` for its partition."""
    q, k, v = under_autocast(q, k, v)
    bias, k0, v0 = like_maps(k, bias, *((None, None) if outside is None else outside))
    return operator(q, k, v, bias, k0, v0, list(window), grid, scale)[0]


class Plan:
    """How calls of one kind are divided into programs, and the arguments that all their kernels share."""

    def __init__(
        self, q: torch.Size, k: torch.Size, window: tuple[int, int], grid: bool, extended: bool, precision: str
    ) -> None:
        B, H, W, heads, D = k
        wh, ww = window
        tokens, GH, GW = wh * ww, -(-H // wh), -(-W // ww)
        padded = power_of_two(tokens) if tokens <= TILE else -(-tokens // TILE) * TILE
        self.pack = max(TILE // padded, 1)
        self.lanes = padded * self.pack
        self.parts = self.lanes // TILE  # tiles of a window; more than one only if it is not packed
        self.packs = -(-GH * GW // self.pack)
        self.total = B * self.packs
        self.heads, self.windows = heads, GH * GW
        self.shared = q[1:3] != k[1:3]
        # if windows divide the map, nothing is outside
        edge = H % wh > 0 or W % ww > 0
        self.outside = extended and edge
        self.sizes = (self.packs, heads, H, W, GH, GW, int(grid))
        self.constants = dict(
            D=D,
            WH=wh,
            WW=ww,
            SHARED=self.shared,
            EDGE=edge,
            PADDED=padded,
            BLOCK=TILE,
            BLOCK_D=max(power_of_two(D), 16),
            PRECISION=precision,
        )
        self.kept = {name: value for name, value in self.constants.items() if name != "EDGE"}
        if self.parts == 1:
            self.constants["PACK"] = self.pack
        # the keys of the last tile, if they are fewer, in a number of lanes that a matmul supports
        rest = max(power_of_two(tokens % TILE or TILE), 16)
        self.kept["TAIL"] = rest if rest < TILE else 0
        # whether the table entries of a tile of queries fit into registers: masks of keys beyond an edge need many
        self.keeps = self.parts > 1 and self.parts - (rest < TILE) <= KEPT and D <= NARROW and not edge

    def groups(self, programs: int, most: int) -> tuple[int, int]:
        """The number of groups that all packs are divided into, with `programs` programs per group and about `most` in
        total, and the number of packs per group.
        """
        share = max(-(-self.total // max(most // programs, 1)), 1)  # an empty batch has none
        return -(-self.total // share), share


plan_of = lru_cache(maxsize=1024)(Plan)  # models make few kinds of calls, each many times


def forward(q, k, v, bias, k0, v0, window, grid, scale):
    out, lse = outputs(q, k, v)
    plan = plan_of(q.shape, k.shape, tuple(window), grid, k0 is not None, precision(k.dtype))
    given = (q, k, v, *contiguous(bias, *((k0, v0) if plan.outside else (None, None))), out, lse)
    given += tuple(strides(q, k, v))
    last = (*plan.sizes, scale)
    if plan.keeps and bias is not None and bias.element_size() == k.element_size() == 2:
        groups, share = plan.groups(plan.heads * plan.parts, PROGRAMS["kept"])
        given += (plan.total, share)
        launch(forward_kept_kernel, groups * plan.parts * plan.heads, *given, *last, **plan.kept)
        return out, lse
    if plan.parts > 1:
        launch(forward_tiles_kernel, plan.total * plan.parts * plan.heads, *given, *last, **plan.constants)
        return out, lse
    groups, share = (plan.total, 1) if bias is None else plan.groups(plan.heads, PROGRAMS["forward"])
    launch(forward_kernel, groups * plan.heads, *given, plan.total, share, *last, **plan.constants)
    return out, lse


def backward(grad, q, k, v, bias, k0, v0, window, grid, scale, out, lse, lay=apart, table=True):
    window = tuple(window)
    plan = plan_of(q.shape, k.shape, window, grid, k0 is not None, precision(k.dtype))
    given = (q, k, v, *contiguous(bias, *((k0, v0) if plan.outside else (None, None))), grad)
    steps = strides(q, k, v, grad)
    (dq, dk, dv), (pitch_q, pitch, _) = lay(q, k, v)
    if plan.shared:
        # one query serves all windows: its gradient is stored per window, but for tokens beyond the map, then summed
        make = q.new_zeros if plan.constants["EDGE"] else q.new_empty
        dq = make((q.shape[0], plan.windows, *q.shape[1:]), dtype=torch.float32)
    summed = plan.outside or (bias is not None and plan.parts == 1)
    groups, share = plan.total, 1
    if summed:
        groups, share = plan.groups(plan.heads * plan.parts, PROGRAMS["backward" if plan.parts == 1 else "tiles"])
    outside = lse.new_empty((groups * plan.parts, plan.heads, 2, k.shape[4])) if plan.outside else None
    cut = (pitch, plan.total, share, *plan.sizes, scale)
    pairs = None
    if plan.parts == 1:
        if bias is not None:  # needed or not: without these sums the kernel would be another binary
            pairs = lse.new_empty((groups, plan.heads, plan.lanes, plan.lanes))
        made = (lse, dq, dk, dv, pairs, outside, *steps, pitch_q)
        launch(backward_kernel, groups * plan.heads, *given, *made, *cut, **plan.constants)
    else:
        delta = lse.new_empty(lse.shape)
        # large logits: lse is rounded, and by it alone a row's probabilities would not sum to 1
        inverse = lse.new_empty(lse.shape) if q.dtype == torch.float32 else None
        programs = plan.total * plan.parts * plan.heads
        last = (out, lse, dq, delta, inverse, *steps, pitch_q, *plan.sizes, scale)
        launch(backward_queries_kernel, programs, *given, *last, **plan.constants)
        programs = groups * plan.parts * plan.heads
        made = (lse, delta, inverse, dk, dv, outside, *steps)
        launch(backward_keys_kernel, programs, *given, *made, *cut, **plan.constants)
    if bias is not None and plan.parts > 1 and table:
        groups, share = plan.groups(plan.heads * plan.parts**2, PROGRAMS["tiles"])
        pairs = lse.new_empty((groups, plan.heads, plan.lanes, plan.lanes))
        last = (lse, delta, inverse, pairs, *steps, plan.total, share, *plan.sizes, scale)
        launch(backward_bias_kernel, groups * plan.parts**2 * plan.heads, *given, *last, **plan.constants)
    dbias = None
    if pairs is not None and table:
        dbias = table_gradient(pairs, bias, window, (0, 0, *window), plan.pack, plan.lanes // plan.pack)
    dq = dq.sum(1).to(q.dtype) if plan.shared else dq
    return dq, dk, dv, dbias, *outside_gradients(outside, k0, v0)


def specification(q, k, v, bias, k0, v0, window, grid, scale):
    outside = None if k0 is None else (k0, v0)
    return reference.attend(q, k, v, bias, tuple(window), grid, scale, outside)


operator = register(
    "window_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? k0, Tensor? v0, int[] window, bool grid, float scale",
    outputs=outputs,
    forward=forward,
    backward=backward,
    as_given=lambda needed, *given: backward(*given, lay=as_given, table=needed[3]),
    specification=specification,
    reads_result=lambda q, k, v, bias, k0, v0, window, grid, scale: window[0] * window[1] > TILE,
)
