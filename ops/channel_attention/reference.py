"""The specification of channel attention."""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.channel_attention`."""
    logits = torch.einsum("byxhi, byxhj -> bhij", k * scale, v)
    return torch.einsum("bhij, byxhj -> byxhi", logits.softmax(-1), q)
