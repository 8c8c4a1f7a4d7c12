"""Window attention in ordinary PyTorch operators, arranged for speed.

q, k and v are each copied once into windows, head by head, and the result once back; bias and mask start the sum that
the matrix product of the logits adds to, so that no pass over the logits is spent on them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    grid: bool,
    scale: float,
    outside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.window_attention`, `grid` for its partition."""
    B, H, W, heads, D = k.shape
    wh, ww = window
    down, right = -H % wh, -W % ww
    shared = q.shape[1] != H or q.shape[2] != W
    mask = relative(bias.to(q.dtype), wh, ww) if bias is not None else None  # (heads, N, N)
    if down > 0 or right > 0:
        if outside is None:
            hidden = hide(H, W, wh, ww, grid, heads, k)  # (groups * heads, 1, N)
            mask = hidden if mask is None else hidden + mask.repeat(hidden.shape[0] // heads, 1, 1)
        k = extend(k, down, right, outside[0] if outside is not None else None)
        v = extend(v, down, right, outside[1] if outside is not None else None)
        q = q if shared else extend(q, down, right, None)
    Hx, Wx = H + down, W + right
    if shared:
        q = q.reshape(B, 1, 1, wh, ww, heads, D).expand(-1, Hx // wh, Wx // ww, -1, -1, -1, -1)
        q = q.permute(0, 1, 2, 5, 3, 4, 6).reshape(-1, wh * ww, D)
    else:
        q = split(q, wh, ww, grid)
    k, v = split(k, wh, ww, grid), split(v, wh, ww, grid)  # (B * groups * heads, N, D)
    out = matrices(q, k, v, mask, heads, scale)
    out = out.reshape(B, Hx // wh, Wx // ww, heads, wh, ww, D)
    out = out.permute(0, 4, 1, 5, 2, 3, 6) if grid else out.permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(B, Hx, Wx, heads, D)[:, :H, :W]


def matrices(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """softmax(scale * q @ k.T + mask) @ v of many matrices q (N, D), k and v (K, D), head after head.

    mask (M, 1 or N, K) repeats.
    """
    N, K = q.shape[1], k.shape[1]
    learned = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    # a fused SDPA never holds the logits, but on CPUs it gives no gradient of a mask and is slower up to 64 tokens
    if k.is_cpu and (learned or K <= 64):
        if mask is None:
            logits = torch.bmm(q * scale, k.transpose(1, 2))
        else:
            logits = mask.expand(-1, N, -1).repeat(q.shape[0] // mask.shape[0], 1, 1)
            logits = logits.baddbmm_(q, k.transpose(1, 2), alpha=scale)
        return torch.bmm(logits.softmax(-1).to(v.dtype), v)
    count = heads if mask is None else mask.shape[0]
    q, k, v = q.view(-1, count, N, q.shape[2]), k.view(-1, count, K, k.shape[2]), v.view(-1, count, K, v.shape[2])
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.unsqueeze(0), scale=scale)


def extend(x: Tensor, down: int, right: int, token: Tensor | None) -> Tensor:
    """The map with `down` rows and `right` columns more at its end, of zeros or of `token` (heads, D)."""
    if token is None:
        return F.pad(x, [0, 0, 0, 0, 0, right, 0, down])
    B, H, W, heads, D = x.shape
    token = token.to(x.dtype)
    x = torch.cat([x, token.expand(B, H, right, heads, D)], 2)
    return torch.cat([x, token.expand(B, down, W + right, heads, D)], 1)


def split(x: Tensor, wh: int, ww: int, grid: bool) -> Tensor:
    """(B, H, W, heads, D) -> (B * groups * heads, wh * ww, D)."""
    B, H, W, heads, D = x.shape
    if grid:
        x = x.reshape(B, wh, H // wh, ww, W // ww, heads, D).permute(0, 2, 4, 5, 1, 3, 6)
    else:
        x = x.reshape(B, H // wh, wh, W // ww, ww, heads, D).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(-1, wh * ww, D)


def relative(bias: Tensor, wh: int, ww: int) -> Tensor:
    """(heads, 2*wh-1, 2*ww-1) -> (heads, N, N), query by key: the entry key - query + window - 1 on each axis."""
    # window number i of a row of the table, read backwards, is what query i sees
    views = bias.unfold(1, wh, 1).unfold(2, ww, 1)  # (heads, wh, ww, wh, ww)
    return views.flip(1, 2).reshape(bias.shape[0], wh * ww, wh * ww)


def hide(H: int, W: int, wh: int, ww: int, grid: bool, heads: int, like: Tensor) -> Tensor:
    """(groups * heads, 1, N): 0 for keys inside the map, -inf for those outside."""
    zeros = torch.zeros([1, H, W, 1, 1], dtype=like.dtype, device=like.device)
    mask = F.pad(zeros, [0, 0, 0, 0, 0, -W % ww, 0, -H % wh], value=float("-inf"))
    return split(mask.expand(-1, -1, -1, heads, -1), wh, ww, grid).transpose(1, 2)
