"""Window attention in ordinary PyTorch operators, arranged for speed.

q, k and v are each copied once into windows and the result once back. Where PyTorch's fused attention is used, it reads
windows without a further copy. Elsewhere they are copied head by head for matmuls, and bias and mask are the initial
value to which the matmul adds the logits, so that they need no pass of their own. Without gradients, a few images are
processed at a time, so that the copies stay in the cache.
"""

import torch
from torch import Tensor

from ..dispatch import eager, learning
from ..partition import CACHED, by_head, by_matmuls, extend, fused, hide, matmul_keys, sdpa, tiles
from ..sizes import alike, covering, cropped, laid_out, surely


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
    Hx, Wx = covering(H, wh), covering(W, ww)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if eager(k) and not learning(q, k, v, bias):
            step = at_once(k, wh * ww)
            if step < B:
                out = k.new_empty(B, Hx, Wx, heads, D)
                placed = tiles(out, wh, ww, grid)
                for i in range(0, B, step):
                    few = (t[i : i + step] for t in (q, k, v))
                    placed[i : i + step] = attend_tiles(*few, bias, window, grid, scale, outside)
                return out[:, :H, :W]
    out = attend_tiles(q, k, v, bias, window, grid, scale, outside)
    out = out.permute(0, 3, 1, 4, 2, 5, 6) if grid else out.transpose(2, 3)
    return cropped(laid_out(out).reshape(B, Hx, Wx, heads, D), H, W)


def at_once(k: Tensor, keys: int) -> int:
    """How many images the caches of all threads hold, with q, k, v and the result, split as evenly as possible.

    For matmuls that includes the logits and their softmax: these would be of fresh memory in each pass otherwise.
    """
    B, D = max(k.shape[0], 1), k.shape[-1]
    held = k.numel() * 4 if keys > matmul_keys(k) else k.numel() // D * (4 * D + 2 * keys)
    shares = -(-held * k.element_size() // (CACHED * torch.get_num_threads()))
    return -(-B // min(max(shares, 1), B))


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    grid: bool,
    scale: float,
    outside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The result as `tiles` returns it, in whole groups."""
    H, W, heads, D = k.shape[1:]
    wh, ww = window
    down, right = covering(H, wh) - H, covering(W, ww) - W
    shared = alike(q.shape[1:3], [wh, ww]) and not alike(q.shape[1:3], [H, W])
    mask = relative(bias.to(q.dtype), wh, ww) if bias is not None else None  # (heads, N, N)
    repeated = False
    if not (surely(down == 0) and surely(right == 0)):
        repeated = outside is not None and outside[0].requires_grad
        if outside is None:
            hidden = hide(H, W, wh, ww, grid, heads, k)  # (groups * heads, 1, N)
            if mask is None:
                mask = hidden
            else:
                mask = (hidden.unflatten(0, [-1, heads]) + mask).flatten(0, 1)
                if learning(q, k, v, bias):
                    # queries outside are dropped: a table with -inf may leave them no key, and gradients 0 * NaN
                    mask = mask.masked_fill(hidden.transpose(1, 2) < 0, 0.0)
        k = extend(k, down, right, outside[0] if outside is not None else None)
        v = extend(v, down, right, outside[1] if outside is not None else None)
        q = q if shared else extend(q, down, right, None)
    k, v = tiles(k, wh, ww, grid), tiles(v, wh, ww, grid)
    q = q[:, None, None].expand(k.shape) if shared else tiles(q, wh, ww, grid)
    # the mask is the same in every window: heads need not be split off
    if (mask is None or surely(mask.shape[0] == heads)) and fused(q, k, v, mask, wh * ww, repeated):
        return sdpa(together(q), together(k), together(v), mask, scale).transpose(1, 2).reshape(k.shape)
    out = by_matmuls(by_head(q), by_head(k), by_head(v), mask, heads, scale, repeated)
    return out.view(k.shape[0], k.shape[1], k.shape[2], heads, wh, ww, D).permute(0, 1, 2, 4, 5, 3, 6)


def together(x: Tensor) -> Tensor:
    """A copy of `tiles` in (B * groups, wh * ww, heads, D), returned as (B * groups, heads, wh * ww, D)."""
    return laid_out(x).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def relative(bias: Tensor, wh: int, ww: int) -> Tensor:
    """(heads, 2*wh-1, 2*ww-1) -> (heads, N, N), query by key: entry key - query + window - 1 on each axis."""
    # query i sees the i-th window of the table's row, counted from the end
    views = bias.unfold(1, wh, 1).unfold(2, ww, 1)  # (heads, wh, ww, wh, ww)
    return views.flip(1, 2).reshape(bias.shape[0], wh * ww, wh * ww)
