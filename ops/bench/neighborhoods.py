"""The peers of neighborhood attention."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import neighborhood_attention, unpack
from ..neighborhood_attention.reference import neighbors
from ..partition import extend
from .cases import Call
from .contest import Contest, Peer, flex_attention, heads_first


def contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    """On a map that is smaller than its dilated window, keys outside are attended to, as in the models."""
    (wh, ww), dilation = call["window"], call["dilation"]
    whole = [max(side, n * step) for side, n, step in zip(call.size, (wh, ww), dilation, strict=True)]
    shapes = {
        "packed": (batch, *call.size, 3, call.heads, call.dim),
        "bias": (call.heads, 2 * wh - 1, 2 * ww - 1),
    }
    if whole != list(call.size):
        shapes["outside"] = (2, call.heads, call.dim)
    inputs = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}

    def op(packed: Tensor, bias: Tensor, outside: Tensor | None = None, impl: str = "auto") -> Tensor:
        beyond = None if outside is None else tuple(outside)
        return neighborhood_attention(*unpack(packed), bias, (wh, ww), dilation, outside=beyond, impl=impl)

    def extended(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A peer without this option: its map is extended, and its result cropped."""

        def on_whole(packed: Tensor, bias: Tensor, outside: Tensor | None = None) -> Tensor:
            if outside is None:
                return run(packed, bias)
            down, right = whole[0] - call.size[0], whole[1] - call.size[1]
            parts = zip(packed.unbind(3), (torch.zeros_like(outside[0]), *outside), strict=True)
            out = run(torch.stack([extend(part, down, right, token) for part, token in parts], 3), bias)
            return out[:, : call.size[0], : call.size[1]]

        return on_whole

    near = [neighbors(*axis, torch.device(device)) for axis in zip(whole, (wh, ww), dilation, strict=True)]
    peers = {
        "unfold": Peer(extended(partial(unfolded, near=near))),
        "flex": Peer(extended(flex(whole, (wh, ww), dilation, near))),
        "natten": Peer(extended(partial(natten, window=wh, dilation=dilation[0]))),
        "natten without bias": Peer(
            extended(partial(natten_without_bias, window=(wh, ww), dilation=dilation)), without_bias=True
        ),
    }
    return Contest(inputs, op, peers)


def unfolded(packed: Tensor, bias: Tensor, near: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Copies the keys and values of every query."""
    (rows, row_steps), (cols, col_steps) = near
    q, k, v = packed.unbind(3)
    k, v = (t[:, rows][:, :, :, cols] for t in (k, v))  # (B, H, wh, W, ww, heads, D)
    logits = torch.einsum("byxhd, byixjhd -> bhyxij", q * q.shape[-1] ** -0.5, k)
    logits = logits + bias[:, row_steps[:, None, :, None], col_steps[None, :, None, :]]
    attention = logits.flatten(4).softmax(-1).view_as(logits)
    return torch.einsum("bhyxij, byixjhd -> byxhd", attention, v)


def flex(
    size: Sequence[int], window: tuple[int, int], dilation: tuple[int, int], near: list[tuple[Tensor, Tensor]]
) -> Callable[..., Tensor]:
    """FlexAttention with the neighborhood as a block mask, created once, and the bias in the score_mod."""
    (H, W), (wh, ww), (dh, dw) = size, window, dilation
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
