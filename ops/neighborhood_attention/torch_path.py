"""Neighborhood attention in ordinary PyTorch operators, arranged for speed.

Lines, the positions that are equal modulo the dilation, are laid out side by side and cut into tiles of queries. The
windows of a tile overlap, so its keys form a tile too, wider by a halo: they are copied once for all its queries
instead of once for each. Keys that a query does not attend to are masked by the bias that is added to the logits.
Without gradients, a few images are processed at a time, so that the copies stay in the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import eager, learning, under_autocast
from ..partition import CACHED, by_matmuls, extend
from ..sizes import ceil, cropped, laid_out, surely
from ..window_attention.torch_path import attend as window_attend

Spans = tuple[int, int, int, int]


class Axis(NamedTuple):
    """How the lines of an axis are cut into `count` tiles of `size` queries with `reach` keys.

    first  index in its line of the first tile's first query: 0, or negative, where there is no query
    start  index in its line of the first tile's first key, likewise
    keys   (tiles, reach): index of each key in its line; no query attends to indices outside the line
    steps  (lines or 1, tiles, size, reach): the key's index in a bias table, 2 * window - 1 if it is not attended to;
           2 * window for all keys of a query beyond its line, which is cropped later
    """

    first: int
    count: int
    size: int
    start: int
    reach: int
    keys: Tensor
    steps: Tensor


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
    if not torch.jit.is_scripting():
        q, k, v = under_autocast(q, k, v)
    B, H, W, heads, D = q.shape
    wh, ww = window
    # larger dilations are equivalent: a line has one position of the map, and its other neighbors are outside
    dh, dw = min(dilation[0], H), min(dilation[1], W)
    if surely(wh * dh == H) and surely(ww * dw == W):  # each line is one window
        return window_attend(q, k, v, bias, window, True, scale, None)
    if outside is not None:
        down, right = max(wh * dh - H, 0), max(ww * dw - W, 0)
        k, v = extend(k, down, right, outside[0]), extend(v, down, right, outside[1])
    few = False
    if not torch.jit.is_scripting():
        few = eager(k) and not learning(q, k, v, bias)
    rows = axis(H, k.shape[1], wh, dh, few, q.device)
    cols = axis(W, k.shape[2], ww, dw, few, q.device)
    mask = relative(bias, wh, ww, rows.steps, cols.steps, q.dtype).expand(-1, -1, -1, -1, heads, -1, -1)
    if not (surely(mask.shape[0] == 1) and surely(mask.shape[1] == 1)):
        mask = mask.expand(dh, dw, -1, -1, -1, -1, -1)
    mask = mask.flatten(0, 4)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if few:
            tiles = rows.count * cols.count * dh * dw * heads * D
            copied = 2 * tiles * (rows.size * cols.size + rows.reach * cols.reach) * k.element_size()
            step = max(CACHED * torch.get_num_threads() // copied, 1)
            out = q.new_empty(q.shape)
            for i in range(0, B, step):
                some = (t[i : i + step] for t in (q, k, v))
                out[i : i + step] = attend_tiles(*some, mask, (dh, dw), rows, cols, scale, True)
            return out
    return attend_tiles(q, k, v, mask, (dh, dw), rows, cols, scale, False)


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dilation: tuple[int, int],
    rows: Axis,
    cols: Axis,
    scale: float,
    few: bool,
) -> Tensor:
    """The result for all images at once; with `few`, maps are copied in one pass, which has no fast gradient."""
    B, H, W, heads, D = q.shape
    dh, dw = dilation
    nh, th, nw, tw = rows.count, rows.size, cols.count, cols.size
    if few:
        q = views(q, dilation, (rows.first, nh, th, th), (cols.first, nw, tw, tw))
        near = (rows.start, nh, rows.reach, th), (cols.start, nw, cols.reach, tw)
        k, v = views(k, dilation, near[0], near[1]), views(v, dilation, near[0], near[1])
    else:
        mh, mw = ceil(k.shape[1], dh), ceil(k.shape[2], dw)
        q = split(lines(q, th * nh, dh, tw * nw, dw), th, nh, tw, nw)
        k = split(gather(lines(k, mh, dh, mw, dw), rows, cols), rows.reach, nh, cols.reach, nw)
        v = split(gather(lines(v, mh, dh, mw, dw), rows, cols), rows.reach, nh, cols.reach, nw)
    out = by_matmuls(q, k, v, mask, heads, scale).view(B, dh, dw, nh, nw, heads, th, tw, D)
    out = laid_out(out.permute(0, 3, 6, 1, 4, 7, 2, 5, 8)).reshape(B, nh * th * dh, nw * tw * dw, heads, D)
    if few:  # the first tile may begin before the map
        out = out[:, -rows.first * dh :, -cols.first * dw :]
    return cropped(out, H, W)


def axis(
    queries: int,
    keys: int,
    window: int,
    dilation: int,
    even: bool,
    device: torch.device,
    largest: int = 7,
    whole: int = 16,
) -> Axis:
    """Cuts lines into tiles of at most `largest` queries; a line of at most `whole` queries is one tile.

    even   whether tiles of queries and of keys begin at equal distances, if necessary outside their lines. Otherwise
           the tiles at both ends are shifted inside
    """
    most, longest, shortest = ceil(queries, dilation), ceil(keys, dilation), keys // dilation
    before = window // 2
    first, start, size, count, reach = 0, 0, most, 1, longest
    if not surely(most <= whole):
        count = ceil(most, largest)
        size, start = largest, -before
        reach = min(size + window - 1, longest)
        if even:
            size = ceil(most, count)
            first = -((count * size - most) // 2)  # half of the excess is before the line
            # the windows of queries at both ends shift inward, possibly beyond the halo of their tile
            less = max(first + (count - 1) * size - before - (shortest - window), 0)
            more = max(window - (first + size + before), 0)
            start, reach = first - before - less, size + 2 * before + less + more
    tiles = torch.arange(count, device=device)[:, None] * size
    query = (first + tiles + torch.arange(size, device=device)).unsqueeze(2)
    begin = start + tiles if even else (start + tiles).clamp(0, longest - reach)
    key = begin + torch.arange(reach, device=device)
    line = torch.arange(1 if surely(keys % dilation == 0) else dilation, device=device).view(-1, 1, 1, 1)
    length = (keys - line + dilation - 1) // dilation  # differs by one if the dilation does not divide the size
    least = torch.minimum((query - before).clamp(min=0), length - window)
    near = key.unsqueeze(1)
    attended = (near >= least) & (near < least + window)
    step = torch.where(attended, near - query + window - 1, 2 * window - 1)
    own = (query >= 0) & (query < (queries - line + dilation - 1) // dilation)
    return Axis(first, count, size, start, reach, key, torch.where(own, step, 2 * window))


def relative(bias: Tensor | None, wh: int, ww: int, rows: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias, or -inf: (row lines, column lines, row tiles, column tiles, heads or 1, queries, keys).

    0 for queries beyond their line: a bias with -inf may leave them no key, and gradients 0 * NaN.
    """
    if bias is None:
        bias = torch.zeros([1, 2 * wh - 1, 2 * ww - 1], dtype=dtype, device=rows.device)
    table = F.pad(F.pad(bias.to(dtype), [0, 1, 0, 1], value=float("-inf")), [0, 1, 0, 1])
    # columns first: single columns are then taken from the small table, and whole rows from the larger result
    table = table.index_select(2, cols.flatten()).index_select(1, rows.flatten())
    table = table.unflatten(2, cols.shape).unflatten(1, rows.shape)  # (heads, then both axes as in `rows`)
    return table.permute(1, 5, 2, 6, 0, 3, 7, 4, 8).flatten(7, 8).flatten(5, 6)


def views(x: Tensor, dilation: tuple[int, int], rows: Spans, cols: Spans) -> Tensor:
    """(B, H, W, heads, D) -> (B * lines * tiles * heads, positions of a tile, D), in one copy of overlapping views.

    rows, cols   start of the first tile, number of tiles, their size and their distance; positions beyond a line are
                 zeros
    """
    H, W = x.shape[1], x.shape[2]
    dh, dw = dilation
    mh, mw = (rows[1] - 1) * rows[3] + rows[2], (cols[1] - 1) * cols[3] + cols[2]
    top, left = -rows[0] * dh, -cols[0] * dw
    x = F.pad(x, [0, 0, 0, 0, left, mw * dw - W - left, top, mh * dh - H - top])
    x = x.unflatten(2, [mw, dw]).unflatten(1, [mh, dh])  # (B, mh, dh, mw, dw, heads, D)
    x = x.unfold(1, rows[2], rows[3]).unfold(3, cols[2], cols[3])  # (B, nh, dh, nw, dw, heads, D, th, tw)
    return x.permute(0, 2, 4, 1, 3, 5, 7, 8, 6).reshape(-1, rows[2] * cols[2], x.shape[6])


def lines(x: Tensor, mh: int, dh: int, mw: int, dw: int) -> Tensor:
    """(B, H, W, heads, D) -> (B, mh, dh, mw, dw, heads, D), zeros where a line is shorter."""
    B, H, W, heads, D = x.shape
    x = F.pad(x, [0, 0, 0, 0, 0, mw * dw - W, 0, mh * dh - H])
    return x.reshape(B, mh, dh, mw, dw, heads, D)


def gather(x: Tensor, rows: Axis, cols: Axis) -> Tensor:
    """The keys of every tile side by side, which they already are if a line is one tile."""
    x = x.index_select(1, rows.keys.flatten()) if not surely(rows.count == 1) else x
    return x.index_select(3, cols.keys.flatten()) if not surely(cols.count == 1) else x


def split(x: Tensor, th: int, nh: int, tw: int, nw: int) -> Tensor:
    """(B, nh * th, dh, nw * tw, dw, heads, D) -> (B * dh * dw * nh * nw * heads, th * tw, D)."""
    B, _, dh, _, dw, heads, D = x.shape
    x = x.view(B, nh, th, dh, nw, tw, dw, heads, D).permute(0, 3, 6, 1, 4, 7, 2, 5, 8)
    return laid_out(x).reshape(-1, th * tw, D)
