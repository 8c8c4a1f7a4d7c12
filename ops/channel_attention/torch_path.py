"""Channel attention in ordinary PyTorch operators: each map is copied once, head by head, for two matmuls."""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.channel_attention`."""
    B, H, W, heads, D = q.shape
    attention = logits(k, v, scale).softmax(-1).to(q.dtype)  # (B * heads, D, D)
    out = torch.bmm(by_head(q), attention.transpose(1, 2))
    return out.view(B, heads, H, W, D).permute(0, 2, 3, 1, 4)


def logits(k: Tensor, v: Tensor, scale: float) -> Tensor:
    """scale * k.T @ v, (B * heads, D, D), in float32 at least, since they grow with the number of tokens."""
    if k.dtype == torch.float16 or k.dtype == torch.bfloat16:
        k, v = k.float(), v.float()
        if not torch.jit.is_scripting():
            with torch.autocast(k.device.type, enabled=False):
                return torch.bmm(by_head(k).transpose(1, 2), by_head(v)) * scale
    return torch.bmm(by_head(k).transpose(1, 2), by_head(v)) * scale


def by_head(x: Tensor) -> Tensor:
    """(B, H, W, heads, D) -> (B * heads, H * W, D)."""
    B, H, W, heads, D = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(B * heads, H * W, D)
