"""The peers of channel attention and of attention to a set of keys."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import channel_attention, pooled_attention, unpack
from .cases import Call
from .contest import Contest, Peer, Projected, flex_attention, heads_first, products


def channel_contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    (H, W), heads, dim = call.size, call.heads, call.dim
    # as after a projection of normalised maps early in training: sums over the map must not saturate the softmax
    packed = torch.randn(batch, H, W, 3, heads, dim, device=device, dtype=dtype) * (H * W) ** -0.25

    def op(packed: Tensor, impl: str = "auto") -> Tensor:
        return channel_attention(*unpack(packed), impl=impl)

    def timm(packed: Tensor) -> Tensor:
        module.qkv.given = packed.flatten(3).flatten(1, 2)
        return module(shaped).view(batch, H, W, heads, dim)

    def sdpa(packed: Tensor) -> Tensor:
        """Channels as tokens: k as the queries, v as the keys and q as the values."""
        q, k, v = (heads_first(t).transpose(2, 3) for t in packed.unbind(3))  # (B, heads, D, H * W)
        out = F.scaled_dot_product_attention(k, v, q, scale=dim**-0.5)
        return out.permute(0, 3, 1, 2).unflatten(1, (H, W))

    from timm.models.davit import ChannelAttention

    module = ChannelAttention(heads * dim, heads, device=device, dtype=dtype)
    module.qkv, module.proj = Projected(), nn.Identity()
    shaped = torch.empty(batch, H * W, heads * dim, device="meta")  # the module only reads the shape of its input
    return Contest({"packed": packed}, op, {"timm": Peer(timm), "sdpa": Peer(sdpa)})


def pooled_contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    (H, W), heads, dim, keys = call.size, call.heads, call.dim, call["keys"]
    inputs = {
        "q": torch.randn(batch, H, W, heads, dim, device=device, dtype=dtype),
        "kv": torch.randn(batch, keys, 2, heads, dim, device=device, dtype=dtype),
    }

    def op(q: Tensor, kv: Tensor, impl: str = "auto") -> Tensor:
        return pooled_attention(q, *kv.unbind(2), impl=impl)

    def multiplied(q: Tensor, kv: Tensor) -> Tensor:
        k, v = (heads_first(t) for t in kv.unbind(2))
        return products(heads_first(q), k, v, dim**-0.5).transpose(1, 2).unflatten(1, (H, W))

    attention = flex_attention()

    def flex(q: Tensor, kv: Tensor) -> Tensor:
        k, v = (heads_first(t) for t in kv.unbind(2))
        return attention(heads_first(q), k, v).transpose(1, 2).unflatten(1, (H, W))

    # the op is PyTorch's own kernel: we have no other path
    return Contest(inputs, op, {"products": Peer(multiplied), "flex": Peer(flex)}, kernel=False)
