"""Pooled attention: every query of the map attends to all keys of a smaller set."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_dtypes, check_map, factor
from ..dispatch import choose, eager, learning
from ..partition import CACHED, HAS_AVX512, HAS_BFLOAT16, by_matmuls, learnt_keys, matmul_keys, sdpa
from ..sizes import laid_out, surely
from . import reference

REGISTER = 16  # float32 in a register of AVX-512
SPARE = 4  # keys beyond whole registers up to which padding costs more than it saves


def pooled_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Plain softmax attention of a map of queries to a shared set of keys.

        out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   all j

    q          (B, H, W, heads, D), any strides
    k, v       (B, h, w, heads, D) or (B, N, heads, D), any strides
    scale      factor on the logits; None: D ** -0.5
    returns    (B, H, W, heads, D)

    `torch` is scaled_dot_product_attention, which uses the fused kernel wherever there is one. On a CPU it is two
    matmuls and a softmax where these are faster: if gradients are needed, for up to 64 keys (in half precision 384, 196
    or none, as the CPU multiplies it); without gradients for small maps and up to 64 keys, without AVX-512 or with its
    instructions for bfloat16, in float32 on several threads. With AVX-512, keys may be padded to whole registers, and
    the padding masked.
    Raises ValueError for invalid shapes and dtypes, and what `ops.dispatch.choose` raises for `impl`.
    Source: LITv2's Lo-Fi, https://arxiv.org/abs/2205.13213, section 3.2; SG-Former, https://arxiv.org/abs/2308.12216.
    """
    fits = q.dim() == 5 and (k.dim() == 4 or k.dim() == 5) and k.shape == v.shape
    if not fits or k.shape[0] != q.shape[0] or k.shape[-2:] != q.shape[-2:]:
        raise ValueError(
            f"q, k, v are {q.shape}, {k.shape}, {v.shape}: expected q (B, H, W, heads, D), and k and v both "
            "(B, h, w, heads, D) or (B, N, heads, D)"
        )
    check_map("q", q)
    if k.shape[1] == 0 or k.shape[-3] == 0:
        raise ValueError(f"k and v are {k.shape}: expected at least one key")
    check_dtypes("q, k, v", [q, k, v])
    scale_ = factor(scale, q.shape[-1])
    if k.dim() == 5:
        k, v = k.flatten(1, 2), v.flatten(1, 2)
    if torch.jit.is_scripting():
        return _torch(q, k, v, scale_)
    else:
        name = choose(impl, q, op="pooled_attention", has=("torch", "reference"))
        return reference.attend(q, k, v, scale_) if name == "reference" else _torch(q, k, v, scale_)


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    H, W = q.shape[1], q.shape[2]
    q, k, v = q.flatten(1, 2).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, tokens, D)
    if q.is_cpu and divided(q, k, v):
        q, k, v = laid_out(q), laid_out(k), laid_out(v)
        out = by_matmuls(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), None, q.shape[1], scale).view(q.shape)
    else:
        mask = None
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
            if ragged(q, k, v):
                k, v, mask = padded(k, v, q.shape[2])
        out = sdpa(q, k, v, mask, scale)
    return out.transpose(1, 2).unflatten(1, [H, W])


def divided(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether matmuls are faster for few keys: for gradients, and on some CPUs without, if logits fit in the cache."""
    if learning(q, k, v, None):
        return surely(k.shape[2] <= learnt_keys(k))
    if torch.jit.is_scripting():
        return False
    else:
        if not eager(q) or (HAS_AVX512 and not HAS_BFLOAT16) or k.shape[2] > min(matmul_keys(k), 64):
            return False
        return 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= CACHED


def ragged(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether padding the keys is faster: fused attention takes the last of a row, less than a register, one by one."""
    if not HAS_AVX512 or q.dtype != torch.float32 or not eager(q) or learning(q, k, v, None):
        return False
    return k.shape[2] < q.shape[2] and k.shape[2] % REGISTER > SPARE


def padded(k: Tensor, v: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, heads, N, D) with zeros up to whole registers, and the mask that hides these."""
    count = k.shape[2]
    more = -count % REGISTER
    mask = k.new_zeros(count + more)
    mask[count:] = -torch.inf
    return F.pad(k, [0, 0, 0, more]), F.pad(v, [0, 0, 0, more]), mask.expand(1, queries, -1)
