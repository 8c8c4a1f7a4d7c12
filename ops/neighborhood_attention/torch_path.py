"""Neighborhood attention in ordinary PyTorch operators, arranged for speed.

Lines, the positions equal modulo the dilation, are set side by side and cut into tiles of queries. The windows of a
tile overlap, so its keys are one tile too, wider by a halo: they are copied once for all its queries instead of once
for each. What a query does not attend to is masked by the bias that is added to the logits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..window_attention.torch_path import attend as window_attend
from ..window_attention.torch_path import extend, matrices


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
    B, H, W, heads, D = q.shape
    wh, ww = window
    # with a larger dilation too, a line has one position of the map, and its other neighbors are all outside
    dh, dw = min(dilation[0], H), min(dilation[1], W)
    if wh * dh == H and ww * dw == W:  # each line is one window
        return window_attend(q, k, v, bias, window, True, scale, None)
    if outside is not None:
        down, right = max(wh * dh - H, 0), max(ww * dw - W, 0)
        k, v = extend(k, down, right, outside[0]), extend(v, down, right, outside[1])
    th, nh, rows, row_steps = axis(H, k.shape[1], wh, dh, q.device)
    tw, nw, cols, col_steps = axis(W, k.shape[2], ww, dw, q.device)
    mask = relative(bias, wh, ww, row_steps, col_steps, q.dtype).expand(-1, -1, -1, -1, heads, -1, -1)
    if mask.shape[0] > 1 or mask.shape[1] > 1:
        mask = mask.expand(dh, dw, -1, -1, -1, -1, -1)
    q = split(lines(q, th * nh, dh, tw * nw, dw), th, nh, tw, nw)
    mh, mw = -(-k.shape[1] // dh), -(-k.shape[2] // dw)
    rh, rw = rows.shape[0] // nh, cols.shape[0] // nw
    k = split(gather(lines(k, mh, dh, mw, dw), rows, cols, nh, nw), rh, nh, rw, nw)
    v = split(gather(lines(v, mh, dh, mw, dw), rows, cols, nh, nw), rh, nh, rw, nw)
    out = matrices(q, k, v, mask.flatten(0, 4), heads, scale).view(B, dh, dw, nh, nw, heads, th, tw, D)
    out = out.permute(0, 3, 6, 1, 4, 7, 2, 5, 8)
    return out.reshape(B, nh * th * dh, nw * tw * dw, heads, D)[:, :H, :W]


def axis(
    queries: int, keys: int, window: int, dilation: int, device: torch.device, tile: int = 7, whole: int = 14
) -> tuple[int, int, Tensor, Tensor]:
    """How one axis is cut: queries a tile, tiles a line; the place in its line of every key of every tile; and

    (lines or 1, tiles, queries, keys): where the key is in a bias table, 2 * window - 1 where it is not attended.
    A tile has `tile` queries, but a line of at most `whole` is one tile.
    """
    most, longest = -(-queries // dilation), -(-keys // dilation)
    size = most if most <= whole else tile
    count = -(-most // size)
    reach = longest if count == 1 else min(size + window - 1, longest)
    first = (torch.arange(count, device=device) * size - window // 2).clamp(0, longest - reach)
    key = first[:, None] + torch.arange(reach, device=device)  # (tiles, keys)
    query = torch.arange(count * size, device=device).view(count, size, 1)
    line = torch.arange(dilation if keys % dilation > 0 else 1, device=device).view(-1, 1, 1, 1)
    length = (keys - line + dilation - 1) // dilation  # lines differ by one where the dilation does not divide
    start = torch.minimum((query - window // 2).clamp(min=0), length - window)
    near = key[:, None]
    attended = (near >= start) & (near < start + window)
    step = (near - query + window - 1).clamp(min=0)  # a query beyond its line, later cropped, may be too far away
    return size, count, key.flatten(), torch.where(attended, step, 2 * window - 1)


def relative(bias: Tensor | None, wh: int, ww: int, rows: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias, or -inf: (row lines, column lines, row tiles, column tiles, heads or 1, queries, keys)."""
    if bias is None:
        bias = torch.zeros([1, 2 * wh - 1, 2 * ww - 1], dtype=dtype, device=rows.device)
    table = F.pad(bias.to(dtype), [0, 1, 0, 1], value=float("-inf"))
    table = table.index_select(1, rows.flatten()).index_select(2, cols.flatten())
    table = table.unflatten(2, cols.shape).unflatten(1, rows.shape)  # (heads, then both axes as in `rows`)
    return table.permute(1, 5, 2, 6, 0, 3, 7, 4, 8).flatten(7, 8).flatten(5, 6)


def lines(x: Tensor, mh: int, dh: int, mw: int, dw: int) -> Tensor:
    """(B, H, W, heads, D) -> (B, mh, dh, mw, dw, heads, D), zeros where a line is shorter."""
    B, H, W, heads, D = x.shape
    x = F.pad(x, [0, 0, 0, 0, 0, mw * dw - W, 0, mh * dh - H])
    return x.reshape(B, mh, dh, mw, dw, heads, D)


def gather(x: Tensor, rows: Tensor, cols: Tensor, nh: int, nw: int) -> Tensor:
    """The keys of every tile side by side; where a line is one tile they are already."""
    x = x.index_select(1, rows) if nh > 1 else x
    return x.index_select(3, cols) if nw > 1 else x


def split(x: Tensor, th: int, nh: int, tw: int, nw: int) -> Tensor:
    """(B, nh * th, dh, nw * tw, dw, heads, D) -> (B * dh * dw * nh * nw * heads, th * tw, D)."""
    B, _, dh, _, dw, heads, D = x.shape
    x = x.view(B, nh, th, dh, nw, tw, dw, heads, D).permute(0, 3, 6, 1, 4, 7, 2, 5, 8)
    return x.reshape(-1, th * tw, D)
