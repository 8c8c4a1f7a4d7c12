"""The peers of neighborhood attention."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import neighborhood_attention, unpack
from .cases import Call
from .contest import Contest, Peer, flex_attention, heads_first


def contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    (wh, ww), dilation = call["window"], call["dilation"]
    inputs = {
        "packed": torch.randn(batch, *call.size, 3, call.heads, call.dim, device=device, dtype=dtype),
        "bias": torch.randn(call.heads, 2 * wh - 1, 2 * ww - 1, device=device, dtype=dtype),
    }

    def op(packed: Tensor, bias: Tensor, impl: str = "auto") -> Tensor:
        return neighborhood_attention(*unpack(packed), bias, (wh, ww), dilation, impl=impl)

    near = [neighbors(*axis, device) for axis in zip(call.size, (wh, ww), dilation, strict=True)]
    peers = {
        "unfold": Peer(partial(unfolded, near=near)),
        "flex": Peer(flex(call, near)),
        "natten": Peer(partial(natten, window=wh, dilation=dilation[0])),
        "natten without bias": Peer(partial(natten_without_bias, window=(wh, ww), dilation=dilation), plain=True),
    }
    return Contest(inputs, op, peers)


def neighbors(size: int, window: int, dilation: int, device: str) -> tuple[Tensor, Tensor]:
    """(size, window) on one axis: the neighbors of each position, and their indices in a bias table."""
    place = torch.arange(size, device=device)
    line, step = place % dilation, place // dilation
    length = (size - line + dilation - 1) // dilation
    first = torch.minimum((step - window // 2).clamp(min=0), length - window)
    steps = first[:, None] + torch.arange(window, device=device)
    return steps * dilation + line[:, None], steps - step[:, None] + window - 1


def unfolded(packed: Tensor, bias: Tensor, near: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Copies the keys and values of every query."""
    (rows, row_steps), (cols, col_steps) = near
    q, k, v = packed.unbind(3)
    k, v = (t[:, rows][:, :, :, cols] for t in (k, v))  # (B, H, wh, W, ww, heads, D)
    logits = torch.einsum("byxhd, byixjhd -> bhyxij", q * q.shape[-1] ** -0.5, k)
    logits = logits + bias[:, row_steps[:, None, :, None], col_steps[None, :, None, :]]
    attention = logits.flatten(4).softmax(-1).view_as(logits)
    return torch.einsum("bhyxij, byixjhd -> byxhd", attention, v)


def flex(call: Call, near: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """FlexAttention with the neighborhood as a block mask, created once, and the bias in the score_mod."""
    (H, W), (wh, ww), (dh, dw) = call.size, call["window"], call["dilation"]
    first_row, first_col = near[0][0][:, 0].contiguous(), near[1][0][:, 0].contiguous()
    attention, mask = flex_attention(), None

    def apart(start: Tensor, key: Tensor, window: int, dilation: int) -> Tensor:
        gap = key - start
        return (gap >= 0) & (gap < window * dilation) & (gap % dilation == 0)

    def attended(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return apart(first_row[i // W], j // W, wh, dh) & apart(first_col[i % W], j % W, ww, dw)

    def run(packed: Tensor, bias: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        nonlocal mask
        if mask is None:
            mask = create_block_mask(attended, None, None, H * W, H * W, packed.device)

        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            # clamped where the mask hides the key anyway
            row = ((j // W - i // W) // dh + wh - 1).clamp(0, 2 * wh - 2)
            col = ((j % W - i % W) // dw + ww - 1).clamp(0, 2 * ww - 2)
            return score + bias[h, row, col]

        q, k, v = (heads_first(t) for t in packed.unbind(3))
        return attention(q, k, v, score_mod=biased, block_mask=mask).transpose(1, 2).unflatten(1, (H, W))

    return run


def natten(packed: Tensor, bias: Tensor, window: int, dilation: int) -> Tensor:
    """NATTEN up to 0.17, the last version with a bias and with CPU kernels."""
    from natten.functional import na2d_av, na2d_qk

    q, k, v = (t.permute(0, 3, 1, 2, 4).contiguous() for t in packed.unbind(3))
    attention = na2d_qk(q * q.shape[-1] ** -0.5, k, window, dilation, rpb=bias).softmax(-1)
    return na2d_av(attention, v, window, dilation).permute(0, 2, 3, 1, 4)


def natten_without_bias(packed: Tensor, bias: Tensor, window: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """NATTEN from 0.20 on."""
    from natten import na2d

    return na2d(*(t.contiguous() for t in packed.unbind(3)), kernel_size=window, dilation=dilation)
