"""Channel attention in ordinary PyTorch operators: each map is copied once, head by head, for two matmuls."""

import torch
from torch import Tensor

from ..dispatch import autocasts, wide


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.channel_attention`."""
    B, H, W, heads, D = q.shape
    attention = logits(k, v, scale).softmax(-1).to(q.dtype)  # (B * heads, D, D)
    out = torch.bmm(by_head(q, q.dtype), attention.transpose(1, 2))
    return out.view(B, heads, H, W, D).permute(0, 2, 3, 1, 4)


def logits(k: Tensor, v: Tensor, scale: float) -> Tensor:
    """scale * k.T @ v, (B * heads, D, D), in float32 at least, since they grow with the number of tokens."""
    k, v = by_head(k, wide(k.dtype)), by_head(v, wide(v.dtype))
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if autocasts(k):
            with torch.autocast(k.device.type, enabled=False):
                return torch.bmm(k.transpose(1, 2), v) * scale
    return torch.bmm(k.transpose(1, 2), v) * scale


def by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, heads, D) -> (B * heads, H * W, D), converted by the same copy."""
    B, H, W, heads, D = x.shape
    x = x.permute(0, 3, 1, 2, 4)
    x = x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)
    return x.reshape(B * heads, H * W, D)
