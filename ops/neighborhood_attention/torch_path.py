"""Neighborhood attention in ordinary PyTorch operators, arranged for speed.

Lines, the positions equal modulo the dilation, are set side by side and cut into tiles of queries. The windows of a
tile overlap, so its keys are one tile too, wider by a halo: they are copied once for all its queries instead of once
for each. What a query does not attend to is masked by the bias that is added to the logits. Without gradients images
come a few at a time, so that the copies stay in the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..window_attention.torch_path import CACHED, eager, extend, learning, matrices
from ..window_attention.torch_path import attend as window_attend


class Cut(NamedTuple):
    """How the lines of an axis are cut into `count` tiles of `size` positions, `step` apart.

    The first begins at position `first` of its line: positions below 0 or beyond the line are zeros.
    """

    first: int
    count: int
    size: int
    step: int


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
    row, near_row, row_steps = axis(H, k.shape[1], wh, dh, q.device)
    col, near_col, col_steps = axis(W, k.shape[2], ww, dw, q.device)
    mask = relative(bias, wh, ww, row_steps, col_steps, q.dtype).expand(-1, -1, -1, -1, heads, -1, -1)
    if mask.shape[0] > 1 or mask.shape[1] > 1:
        mask = mask.expand(dh, dw, -1, -1, -1, -1, -1)
    mask = mask.flatten(0, 4)
    tiles, near = (row, col), (near_row, near_col)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what stands behind an `and`)
        if eager(k) and not learning(q, k, v, mask):
            count = row.count * col.count * dh * dw * heads * D
            copied = 2 * count * (row.size * col.size + near_row.size * near_col.size)
            step = max(CACHED * torch.get_num_threads() // (copied * k.element_size()), 1)
            if step >= B:
                return attend_tiles(q, k, v, mask, (dh, dw), tiles, near, scale, True)
            out = q.new_empty(B, H, W, heads, D)
            for i in range(0, B, step):
                few = (t[i : i + step] for t in (q, k, v))
                out[i : i + step] = attend_tiles(*few, mask, (dh, dw), tiles, near, scale, True)
            return out
    return attend_tiles(q, k, v, mask, (dh, dw), tiles, near, scale, False)


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dilation: tuple[int, int],
    tiles: tuple[Cut, Cut],
    near: tuple[Cut, Cut],
    scale: float,
    few: bool,
) -> Tensor:
    """The result, where rows and columns of queries are cut into `tiles`, and those of the keys `near` them."""
    B, H, W, heads, D = q.shape
    dh, dw = dilation
    row, col = tiles
    q, k, v = cut(q, dilation, tiles, few), cut(k, dilation, near, few), cut(v, dilation, near, few)
    out = matrices(q, k, v, mask, heads, scale)
    out = out.view(B, dh, dw, row.count, col.count, heads, row.size, col.size, D)
    out = out.permute(0, 3, 6, 1, 4, 7, 2, 5, 8)
    out = out.reshape(B, row.count * row.size * dh, col.count * col.size * dw, heads, D)
    top, left = -row.first * dh, -col.first * dw
    return out[:, top : top + H, left : left + W]


def axis(
    queries: int, keys: int, window: int, dilation: int, device: torch.device, largest: int = 7, whole: int = 16
) -> tuple[Cut, Cut, Tensor]:
    """How the queries and the keys of one axis are cut, and

    (lines or 1, tiles, queries, keys): where the key is in a bias table, 2 * window - 1 where it is not attended.
    A tile has at most `largest` queries, but a line of at most `whole` is one tile.
    """
    most, longest, shortest = -(-queries // dilation), -(-keys // dilation), keys // dilation
    before = window // 2
    if most <= whole:
        of_queries, of_keys = Cut(0, 1, most, most), Cut(0, 1, longest, longest)
    else:
        count = -(-most // largest)
        tile = -(-most // count)
        first = -((count * tile - most) // 2)  # half of what is too much stands before the line
        # the windows of the queries at both ends shift inward, perhaps beyond the halo of their tile
        less = max(first + (count - 1) * tile - before - (shortest - window), 0)
        more = max(window - (first + tile + before), 0)
        of_queries = Cut(first, count, tile, tile)
        of_keys = Cut(first - before - less, count, tile + 2 * before + less + more, tile)
    query, near = positions(of_queries, device).unsqueeze(2), positions(of_keys, device).unsqueeze(1)
    line = torch.arange(dilation if keys % dilation > 0 else 1, device=device).view(-1, 1, 1, 1)
    length = (keys - line + dilation - 1) // dilation  # lines differ by one where the dilation does not divide
    start = torch.minimum((query - before).clamp(min=0), length - window)
    attended = (near >= start) & (near < start + window)
    # a query beyond its line, later cropped, may be too far away
    step = (near - query + window - 1).clamp(0, 2 * window - 2)
    return of_queries, of_keys, torch.where(attended, step, 2 * window - 1)


def positions(cut: Cut, device: torch.device) -> Tensor:
    """Of every tile, (tiles, size)."""
    tile = torch.arange(cut.count, device=device)[:, None] * cut.step
    return cut.first + tile + torch.arange(cut.size, device=device)


def relative(bias: Tensor | None, wh: int, ww: int, rows: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias, or -inf: (row lines, column lines, row tiles, column tiles, heads or 1, queries, keys)."""
    if bias is None:
        bias = torch.zeros([1, 2 * wh - 1, 2 * ww - 1], dtype=dtype, device=rows.device)
    table = F.pad(bias.to(dtype), [0, 1, 0, 1], value=float("-inf"))
    table = table.index_select(1, rows.flatten()).index_select(2, cols.flatten())
    table = table.unflatten(2, cols.shape).unflatten(1, rows.shape)  # (heads, then both axes as in `rows`)
    return table.permute(1, 5, 2, 6, 0, 3, 7, 4, 8).flatten(7, 8).flatten(5, 6)


def cut(x: Tensor, dilation: tuple[int, int], cuts: tuple[Cut, Cut], few: bool) -> Tensor:
    """(B, H, W, heads, D) -> (B * lines * tiles * heads, positions of a tile, D), in the order of the masks.

    few   of few images, without gradients: in one copy, with zeros where a tile leads beyond its line. Else a position
          there is the line's last, and rows and columns are copied in turn: that has the faster gradient.
    """
    H, W = x.shape[1], x.shape[2]
    dh, dw = dilation
    row, col = cuts
    if few:
        top, left = -row.first * dh, -col.first * dw
        mh, mw = (row.count - 1) * row.step + row.size, (col.count - 1) * col.step + col.size
    else:
        top, left, mh, mw = 0, 0, -(-H // dh), -(-W // dw)
    x = F.pad(x, [0, 0, 0, 0, left, mw * dw - W - left, top, mh * dh - H - top])
    x = x.unflatten(2, [mw, dw]).unflatten(1, [mh, dh])  # (B, mh, dh, mw, dw, heads, D)
    if few:
        x = x.unfold(1, row.size, row.step).unfold(3, col.size, col.step).permute(0, 1, 7, 2, 3, 8, 4, 5, 6)
    else:
        x = select(select(x, 1, row), 3, col)
        x = x.unflatten(3, [col.count, col.size]).unflatten(1, [row.count, row.size])
    # (B, row tiles, rows, dh, column tiles, columns, dw, heads, D)
    return x.permute(0, 3, 6, 1, 4, 7, 2, 5, 8).reshape(-1, row.size * col.size, x.shape[8])


def select(x: Tensor, dim: int, cut: Cut) -> Tensor:
    """The positions of all tiles side by side."""
    if cut.first == 0 and cut.step == cut.size and cut.count * cut.size == x.shape[dim]:
        return x
    return x.index_select(dim, positions(cut, x.device).flatten().clamp(0, x.shape[dim] - 1))
