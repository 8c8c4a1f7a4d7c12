"""The specification of neighborhood attention: every query gathers its keys by pixel index."""

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    outside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.neighborhood_attention`, pairs for both axes."""
    height, width = q.shape[1], q.shape[2]
    H, W = max(height, window[0] * dilation[0]), max(width, window[1] * dilation[1])
    if outside is not None:
        k0, v0 = outside
        q, k, v = extend(q, H, W, torch.zeros_like(k0)), extend(k, H, W, k0), extend(v, H, W, v0)
    rows, row_steps = neighbors(H, window[0], dilation[0], q.device)  # (H, wh)
    cols, col_steps = neighbors(W, window[1], dilation[1], q.device)  # (W, ww)
    pixel = rows[:, None, :, None] * W + cols[None, :, None, :]  # (H, W, wh, ww)
    pixel = pixel.flatten(2).flatten(0, 1)  # (queries, keys)

    q, k, v = q.flatten(1, 2), k.flatten(1, 2)[:, pixel], v.flatten(1, 2)[:, pixel]
    logits = scale * torch.einsum("bihd, bijhd -> bhij", q, k)
    if bias is not None:
        near = bias[:, row_steps[:, None, :, None], col_steps[None, :, None, :]]  # (heads, H, W, wh, ww)
        logits = logits + near.flatten(3).flatten(1, 2)
    out = torch.einsum("bhij, bijhd -> bihd", logits.softmax(-1).to(v.dtype), v)
    return out.unflatten(1, [H, W])[:, :height, :width]


def extend(x: Tensor, H: int, W: int, token: Tensor) -> Tensor:
    """Pads the map (B, h, w, heads, D) to (B, H, W, heads, D) with `token` (heads, D)."""
    B, h, w = x.shape[:3]
    token = token.to(x.dtype)
    x = torch.cat([x, token.expand(B, h, W - w, -1, -1)], 2)
    return torch.cat([x, token.expand(B, H - h, W, -1, -1)], 1)


def neighbors(size: int, window: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """On one axis, the neighbors of each position and their indices in a bias table; both (size, window)."""
    position = torch.arange(size, device=device)
    line, place = position % dilation, position // dilation
    length = (size - line + dilation - 1) // dilation  # differs by one if the dilation does not divide the size
    start = torch.minimum((place - window // 2).clamp(min=0), length - window)
    places = start[:, None] + torch.arange(window, device=device)
    return places * dilation + line[:, None], places - place[:, None] + window - 1
