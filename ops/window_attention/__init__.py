"""Window attention: attention inside tiles of the map, or inside strided grids over it."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_bias, check_devices, check_dtypes, check_kind, check_map, check_outside, factor, pair
from ..dispatch import choose
from ..sizes import alike
from . import reference
from .torch_path import attend as torch_attend


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: int | tuple[int, int],
    partition: str = "block",
    scale: float | None = None,
    outside: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention inside every group of `window[0] x window[1]` tokens of a map of any size.

        out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[:, j - i + window - 1]) v[j],   j in the group of i

    k, v       (B, H, W, heads, D), any strides: views of one packed (B, H, W, 3, heads, D) are read in place
    q          the same shape, or (B, wh, ww, heads, D): one window of queries that all windows of its image share
               (GC ViT's global query). The shape decides; where the map is one window the two are the same. q is
               cast to the dtype of k: under autocast a query that was not projected may be float32.
    bias       (heads, 2*wh - 1, 2*ww - 1) or None: a table of relative positions, indexed by key - query + window - 1
               on each axis (as in TensorFlow's MaxViT and in NATTEN; Swin's tables are reversed: flip both axes)
    window     tokens, for both axes or (wh, ww)
    partition  "block": contiguous wh x ww tiles. "grid": token (a, b) of group (r, s) is pixel
               (a*ceil(H/wh) + r, b*ceil(W/ww) + s); `bias` then counts steps of the grid, not pixels
    scale      factor on the logits; None: D ** -0.5
    outside    where the window does not divide the map, the map is padded at the bottom and right. None: keys in the
               padding are masked. (k0, v0), each (heads, D): they are attended to, with this key and value (DaViT and
               LITv2 pad with zeros before the projection, which makes these the projection's bias). Where nothing is
               padded they get zeros as gradients from kernels, and none from `torch`
    returns    (B, H, W, heads, D)

    Raises ValueError for invalid shapes and dtypes, and what `ops.dispatch.choose` raises for `impl`.
    Source: MaxViT, https://arxiv.org/abs/2204.01697, section 3.2; GC ViT, https://arxiv.org/abs/2206.09959, section 3.
    """
    window_ = pair("window", window)
    _check(q, k, v, bias, window_, partition, outside)
    scale_ = factor(scale, q.shape[-1])
    q = q.to(k.dtype)
    if torch.jit.is_scripting():
        return torch_attend(q, k, v, bias, window_, partition == "grid", scale_, outside)
    else:
        attend = {"triton": _triton_attend, "torch": torch_attend, "reference": reference.attend}
        name = choose(impl, q, op="window_attention")
        return attend[name](q, k, v, bias, window_, partition == "grid", scale_, outside)


def _triton_attend(*args: Any) -> Tensor:
    from .triton_path import attend  # triton is only imported where it runs

    return attend(*args)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    partition: str,
    outside: tuple[Tensor, Tensor] | None,
) -> None:
    wh, ww = window
    if partition != "block" and partition != "grid":
        raise ValueError(f"partition is '{partition}': expected 'block' or 'grid'")
    if wh < 1 or ww < 1:
        raise ValueError(f"window is {wh} x {ww}: expected at least 1 x 1")
    if k.dim() != 5 or k.shape != v.shape:
        raise ValueError(f"k is {k.shape} and v {v.shape}: expected both (B, H, W, heads, D)")
    check_map("k", k)
    check_dtypes("k, v", [k, v])
    one_window = [k.shape[0], wh, ww, k.shape[3], k.shape[4]]
    known = alike(q.shape, k.shape) or alike(q.shape, one_window)  # first without adding a guard
    if not known and q.shape != k.shape and list(q.shape) != one_window:
        raise ValueError(f"q is {q.shape}: expected the shape of k, {k.shape}, or one window, {one_window}")
    check_kind("q", q)
    check_devices("q, k", [q, k])
    check_bias(bias, k, wh, ww)
    check_outside(outside, k)
