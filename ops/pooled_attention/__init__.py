"""Pooled attention: every query of the map attends to all keys of a smaller set."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_channels, check_dtypes, factor
from ..dispatch import choose, learning, on_threads
from ..sizes import surely
from . import reference

HAS = ("torch", "reference")
CACHED = 2**22  # bytes


def pooled_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Plain softmax attention of a map of queries to a shared set of keys.

        out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   all j

    q          (B, H, W, heads, D), any strides
    k, v       (B, h, w, heads, D) or (B, N, heads, D), any strides
    scale      factor on the logits; None: D ** -0.5
    returns    (B, H, W, heads, D)

    `torch` is scaled_dot_product_attention, which uses the fused kernel wherever there is one. On a CPU, with up to 64
    keys, it is two matmuls and a softmax where gradients are needed, or where several threads process a small map.
    Raises ValueError for invalid shapes and dtypes, and what `ops.dispatch.choose` raises for `impl`.
    Source: LITv2's Lo-Fi, https://arxiv.org/abs/2205.13213, section 3.2; SG-Former, https://arxiv.org/abs/2308.12216.
    """
    fits = k.shape[0] == q.shape[0] and k.shape[-2:] == q.shape[-2:]
    if q.dim() != 5 or (k.dim() != 4 and k.dim() != 5) or k.shape != v.shape or not fits:
        raise ValueError(
            f"q, k, v are {q.shape}, {k.shape}, {v.shape}: expected q (B, H, W, heads, D), and k and v both "
            "(B, h, w, heads, D) or (B, N, heads, D)"
        )
    check_channels("q", q)
    check_dtypes("q, k, v", [q, k, v])
    scale_ = factor(scale, q.shape[-1])
    if k.dim() == 5:
        k, v = k.flatten(1, 2), v.flatten(1, 2)
    if torch.jit.is_scripting():
        return _torch(q, k, v, scale_)
    else:
        name = choose(impl, q, op="pooled_attention", has=HAS)
        return reference.attend(q, k, v, scale_) if name == "reference" else _torch(q, k, v, scale_)


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    H, W = q.shape[1], q.shape[2]
    q, k, v = q.flatten(1, 2).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, tokens, D)
    if q.is_cpu and surely(k.shape[2] <= 64) and divided(q, k, v):
        out = (q * scale @ k.transpose(2, 3)).softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).unflatten(1, [H, W])


def divided(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether matmuls are faster for few keys: for gradients, and on several threads if the logits fit in the cache."""
    if learning(q, k, v, None):
        return True
    if torch.jit.is_scripting():
        return False
    else:
        return on_threads(q) and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size() <= CACHED
