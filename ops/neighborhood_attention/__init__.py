"""Neighborhood attention: every query attends to the keys nearest to it."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_bias, check_maps, check_outside, factor, pair
from ..dispatch import choose
from . import reference
from .torch_path import attend as torch_attend


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    outside: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each query attends to the `window` keys nearest to it on each axis, `dilation` apart.

        out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[:, (j - i) / dilation + window - 1]) v[j],   j near i

    On each axis, positions that are equal modulo the dilation form a line of their own. The window is centred on the
    query in its line and shifts inward at both ends, so every query has exactly window[0] * window[1] keys.

    q, k, v    (B, H, W, heads, D), any strides
    bias       (heads, 2*wh - 1, 2*ww - 1) or None: indexed by key - query + window - 1 on each axis, in dilated steps
    window     odd number of keys, for both axes or (rows, columns)
    dilation   at least 1, for both axes or (rows, columns)
    scale      factor on the logits; None: D ** -0.5
    outside    for maps that are smaller than window * dilation on an axis. None: they are an error. (k0, v0), each
               (heads, D): the map is padded to that size at the bottom or right with positions that have this key and
               value and are attended to like all others (NATTEN up to 0.15 padded the input of the projection with
               zeros, which makes these the projection's bias)
    returns    (B, H, W, heads, D)

    Raises ValueError for invalid shapes, dtypes and sizes, and what `ops.dispatch.choose` raises for `impl`.
    Source: NAT, https://arxiv.org/abs/2204.07143; DiNAT, https://arxiv.org/abs/2209.15001, section 3.
    """
    window_, dilation_ = pair("window", window), pair("dilation", dilation)
    check_maps(q, k, v)
    scale_ = factor(scale, q.shape[-1])
    check_bias(bias, q, window_[0], window_[1])
    _check_axis("rows", q.shape[1], window_[0], dilation_[0], outside is not None)
    _check_axis("columns", q.shape[2], window_[1], dilation_[1], outside is not None)
    check_outside(outside, q)
    if torch.jit.is_scripting():
        return torch_attend(q, k, v, bias, window_, dilation_, scale_, outside)
    else:
        attend = {"triton": _triton_attend, "torch": torch_attend, "reference": reference.attend}
        name = choose(impl, q, op="neighborhood_attention")
        return attend[name](q, k, v, bias, window_, dilation_, scale_, outside)


def _triton_attend(*args: Any) -> Tensor:
    from .triton_path import attend  # triton is only imported where it runs

    return attend(*args)


def _check_axis(axis: str, size: int, window: int, dilation: int, extended: bool) -> None:
    if window < 1 or window % 2 == 0 or dilation < 1:
        raise ValueError(f"window {window} and dilation {dilation} on {axis}: expected an odd window and dilation >= 1")
    if not extended and size < window * dilation:  # a compiler would guard on the size
        raise ValueError(
            f"the map has {size} {axis}, but window {window} with dilation {dilation} needs "
            f"{window * dilation}: lower the dilation, or pass `outside`, the key and value beyond the map"
        )
