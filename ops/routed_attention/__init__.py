"""Bi-level routing attention: every region of the map attends to the few regions most related to it."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtypes, check_map, check_maps, check_numbers, factor, pair, whole
from ..dispatch import choose
from . import reference
from .reference import rank
from .torch_path import attend as torch_attend


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    route: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each query attends to all keys of the `topk` regions that its own region is routed to, separately per head.

        out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   j in the regions route[region of i]

    q, k, v    (B, H, W, heads, D), any strides
    regions    how many regions the map is cut into, for both axes or (down, across); H and W must be multiples
    topk       how many regions each region attends to, 1 ... regions[0] * regions[1]
    route      (B, R, topk) int64, region indices in row-major order, each at most once per region;
               None: `route_regions`, without gradient
    scale      factor on the logits; None: D ** -0.5 (BiFormer's is (heads * D) ** -0.5)
    returns    (B, H, W, heads, D)

    `torch` gathers keys and values for a few regions at a time, and again in its backward, so that memory grows with
    the map, not with the map times `topk`. On a CPU, up to 8 MiB are gathered at once, and kept for the backward but in
    half precision. With `topk` 1 they are as large as the map, and kept. In a scripted, compiled or exported graph all
    are kept.
    Raises ValueError for invalid shapes and dtypes, and what `ops.dispatch.choose` raises for `impl`.
    Source: BiFormer, https://arxiv.org/abs/2303.08810, section 3.2.
    """
    regions_ = pair("regions", regions)
    check_maps(q, k, v)
    scale_, topk = factor(scale, q.shape[-1]), whole("topk", topk)
    _check(q, regions_, topk)
    R = regions_[0] * regions_[1]
    if route is None:
        route = rank(q, k, regions_, topk)
    elif list(route.shape) != [q.shape[0], R, topk]:
        raise ValueError(f"route is {route.shape}: expected (B, R, topk), ({q.shape[0]}, {R}, {topk})")
    else:
        check_numbers("route", route, q, R)
        route = route.long()
    if torch.jit.is_scripting():
        return torch_attend(q, k, v, regions_, route, scale_)
    else:
        attend = {"triton": _triton_attend, "torch": torch_attend, "reference": reference.attend}
        return attend[choose(impl, q, op="routed_attention")](q, k, v, regions_, route, scale_)


def _triton_attend(*args: Any) -> Tensor:
    from .triton_path import attend  # triton is only imported where it runs

    return attend(*args)


def route_regions(q: Tensor, k: Tensor, regions: int | tuple[int, int], topk: int) -> Tensor:
    """(B, R, topk) int64: for each region, the `topk` regions whose mean keys are most similar to its mean query.

    Means are over the pixels of a region, and the dot product is over all heads together. There is no gradient.
    Arguments and errors are as in `routed_attention`. (There is no scale: a positive one would not change the ranking.)
    """
    regions_ = pair("regions", regions)
    if q.dim() != 5 or q.shape != k.shape:
        raise ValueError(f"q and k are {q.shape}, {k.shape}: expected one shape (B, H, W, heads, D)")
    check_map("q", q)
    check_dtypes("q, k", [q, k])
    topk = whole("topk", topk)
    _check(q, regions_, topk)
    return rank(q, k, regions_, topk)


def _check(q: Tensor, regions: tuple[int, int], topk: int) -> None:
    rows, cols = regions
    if rows < 1 or cols < 1 or q.shape[1] % rows != 0 or q.shape[2] % cols != 0:
        raise ValueError(
            f"a map of {q.shape[1]} x {q.shape[2]} does not divide into {rows} x {cols} regions: pad the map"
        )
    if topk < 1 or topk > rows * cols:
        raise ValueError(f"topk is {topk}: expected 1 to {rows * cols}, the number of regions")
