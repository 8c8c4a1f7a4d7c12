"""The specification of pooled attention."""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (B, H, W, heads, D), k and v (B, N, heads, D) -> (B, H, W, heads, D)."""
    logits = scale * torch.einsum("byxhd, bjhd -> byxhj", q, k)
    return torch.einsum("byxhj, bjhd -> byxhd", logits.softmax(-1), v)
