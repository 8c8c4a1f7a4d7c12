"""The peers of routed attention; all of them share one routing."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import route_regions, routed_attention
from ..routed_attention.reference import cut, join
from .cases import Call
from .contest import Contest, Peer, flex_attention, products


def contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    regions, topk, (H, W) = call["regions"], call["topk"], call.size
    packed = torch.randn(batch, H, W, 3, call.heads, call.dim, device=device, dtype=dtype)
    route = route_regions(packed[:, :, :, 0], packed[:, :, :, 1], regions, topk)
    (rows, cols), (h, w) = regions, (H // regions[0], W // regions[1])

    def op(packed: Tensor, impl: str = "auto") -> Tensor:
        return routed_attention(*packed.unbind(3), regions, topk, route, impl=impl)

    image = torch.arange(batch, device=device)[:, None, None]

    def gathered(packed: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = (cut(t, regions) for t in packed.unbind(3))
        k, v = (t[image, route].flatten(2, 3) for t in (k, v))  # (B, R, topk * P, heads, D)
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))  # (B * R, heads, P or topk * P, D)
        return join(attend(q, k, v).transpose(1, 2).unflatten(0, (batch, -1)), regions, H, W)

    attention = flex_attention()

    def flex(packed: Tensor) -> Tensor:
        """The routing as a block mask, which has to be created anew for every map."""
        from torch.nn.attention.flex_attention import create_block_mask

        chosen = torch.zeros(batch, rows * cols, rows * cols, dtype=torch.bool, device=device).scatter_(2, route, True)

        def attended(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return chosen[b, i // (h * w), j // (h * w)]

        mask = create_block_mask(attended, batch, None, H * W, H * W, device, _compile=device != "cpu")
        q, k, v = (cut(t, regions).flatten(1, 2).transpose(1, 2) for t in packed.unbind(3))
        out = attention(q, k, v, block_mask=mask).transpose(1, 2)  # (B, H * W, heads, D)
        return join(out.unflatten(1, (rows * cols, -1)), regions, H, W)

    peers = {
        "gathered": Peer(partial(gathered, attend=partial(products, scale=call.dim**-0.5))),
        "sdpa": Peer(partial(gathered, attend=F.scaled_dot_product_attention)),
        "flex": Peer(flex),
    }
    return Contest({"packed": packed}, op, peers)
