"""The specification of window attention: every group gathers its tokens by pixel index and attends among them."""

import torch
from torch import Tensor


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
    rows, cols = groups(H, window[0], grid), groups(W, window[1], grid)  # (gh, wh), (gw, ww)
    pixel = rows[:, None, :, None] * W + cols[:, None, :]  # (gh, gw, wh, ww)
    inside = (rows < H)[:, None, :, None] & (cols < W)[:, None, :]
    pixel, inside = (t.flatten(2).flatten(0, 1).to(k.device) for t in (pixel, inside))  # (groups, tokens)

    shared = q.shape[1:3] != k.shape[1:3]
    q = q.flatten(1, 2).unsqueeze(1) if shared else gather(q, pixel, inside, None)  # (B, groups or 1, tokens, heads, D)
    k = gather(k, pixel, inside, None if outside is None else outside[0])
    v = gather(v, pixel, inside, None if outside is None else outside[1])

    logits = scale * torch.einsum("bgihd, bgjhd -> bghij", q.expand_as(k), k)
    if bias is not None:
        logits = logits + relative(bias, window)
    if outside is None:
        logits = logits.masked_fill(~inside[:, None, None, :], float("-inf"))
        # queries outside are dropped: a table with -inf may leave them no key, and then gradients of 0 * NaN
        logits = logits.masked_fill(~inside[:, None, :, None], 0.0)
    out = torch.einsum("bghij, bgjhd -> bgihd", logits.softmax(-1).to(v.dtype), v)

    # every token is written to its pixel; those outside share one extra entry, which is dropped
    place = torch.where(inside, pixel, H * W).flatten()
    flat = out.new_zeros(B, H * W + 1, heads, D).index_copy(1, place, out.flatten(1, 2))
    return flat[:, :-1].unflatten(1, (H, W))


def groups(size: int, window: int, grid: bool) -> Tensor:
    """(groups, window): the position of each token on one axis; positions from `size` on are outside the map."""
    count = -(-size // window)
    places = torch.arange(count * window)
    return places.view(window, count).T if grid else places.view(count, window)


def gather(x: Tensor, pixel: Tensor, inside: Tensor, fill: Tensor | None) -> Tensor:
    """(B, H, W, heads, D) -> (B, groups, tokens, heads, D), with `fill` (heads, D) or zeros for tokens outside."""
    tokens = x.flatten(1, 2)[:, torch.where(inside, pixel, 0)]
    fill = x.new_zeros(()) if fill is None else fill.to(x.dtype)
    return torch.where(inside[..., None, None], tokens, fill)


def relative(bias: Tensor, window: tuple[int, int]) -> Tensor:
    """(heads, 2*wh-1, 2*ww-1) -> (heads, tokens, tokens), query by key: entry key - query + window - 1 per axis."""
    (wh, ww), tokens = window, window[0] * window[1]
    i = torch.arange(tokens, device=bias.device)
    row, col = i // ww, i % ww
    return bias[:, row - row[:, None] + wh - 1, col - col[:, None] + ww - 1]
