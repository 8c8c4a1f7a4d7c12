"""Token reallocation in ordinary PyTorch operators, arranged for speed and low memory use.

Significance never stores the softmax of a large map: queries are processed in blocks, and only the sum of each is kept.
Merging copies tokens as whole rows, group by group, in both orders at once; each run is then one row times a matrix.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import wide
from ..partition import by_head, hide, tiles
from ..sizes import ceil, cropped, filled, laid_out, surely, varies


def received(q: Tensor, k: Tensor, window: tuple[int, int] | None, scale: float, most: int = 2**19) -> Tensor:
    """(B, h, w); arguments as in `ops.significance`, and `most`, the softmax entries to store per image at a time."""
    if window is not None:
        return received_in_windows(q, k, window, scale)
    B, H, W, heads, D = q.shape
    h, w = k.shape[1], k.shape[2]
    queries = q.reshape(B, H * W, heads, D).transpose(1, 2)  # (B, heads, N, D)
    keys = (scale * k).reshape(B, h * w, heads, D).permute(0, 2, 3, 1).flatten(0, 1)  # (B * heads, D, M)
    if varies(H * W):  # the number of blocks would add a guard
        total = attention(queries.flatten(0, 1), keys).sum(1)  # (B * heads, M)
    else:
        size = max(most // (heads * h * w), 1)
        total = attention(queries[:, :, :size].flatten(0, 1), keys).sum(1)
        for start in range(size, H * W, size):
            total = total + attention(queries[:, :, start : start + size].flatten(0, 1), keys).sum(1)
    return (total / (H * W)).view(B, heads, h, w).mean(1)


def received_in_windows(q: Tensor, k: Tensor, window: tuple[int, int], scale: float) -> Tensor:
    """(B, H, W): each window is one small softmax, and all of them are one batched matmul."""
    B, H, W, heads, _ = q.shape
    wh, ww = window
    # only the logits outlive this line, not the copies of q and k
    logits = torch.bmm(split(q, wh, ww), split(k, wh, ww).transpose(1, 2)).mul_(scale)  # (B * groups * heads, N, N)
    if surely(H % wh == 0) and surely(W % ww == 0):
        mean = logits.softmax(-1, dtype=wide(q.dtype)).mean(1)  # (B * groups * heads, N)
    else:
        hidden = hide(H, W, wh, ww, False, heads, q).repeat(B, 1, 1)  # (B * groups * heads, 1, N)
        share = logits.add_(hidden).softmax(-1, dtype=wide(q.dtype))
        inside = (hidden == 0).to(share.dtype).transpose(1, 2)
        # not a matmul: autocast would round the values that are to be ranked
        mean = share.mul_(inside / inside.sum(1, keepdim=True)).sum(1)
    h, w = ceil(H, wh), ceil(W, ww)
    mean = mean.view(B, h, w, heads, wh, ww).mean(3).transpose(2, 3)  # (B, h, wh, w, ww)
    return cropped(laid_out(mean).reshape(B, h * wh, w * ww, 1), H, W).squeeze(3)


def attention(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q @ k) of many matrices (N, D) and (D, M), in float32 at least."""
    return torch.bmm(q, k).softmax(-1, dtype=wide(q.dtype))


def split(x: Tensor, wh: int, ww: int) -> Tensor:
    """(B, H, W, heads, D) -> (B * groups * heads, wh * ww, D), padded with zeros to whole windows."""
    return by_head(tiles(filled(x, (wh, ww)), wh, ww, False))


def merge(x: Tensor, order: Tensor, weights: list[Tensor], biases: list[Tensor], shares: list[int]) -> Tensor:
    """(B, 2, M, C): the tokens of `x` in both orders (B, 2, H * W), merged group by group."""
    B, H, W, C = x.shape
    tokens = x.reshape(B * H * W, C)
    order = order + H * W * torch.arange(B, device=x.device)[:, None, None]
    merged, start, share = [], 0, 0
    for i in range(len(shares)):
        share += shares[i]
        end, run = H * W * share // sum(shares), weights[i].numel()
        # as an embedding lookup, which copies whole rows, as does its gradient
        group = F.embedding(order[:, :, start:end], tokens)  # (B, 2, tokens, C)
        if run == 1:
            group = group * weights[i]
        else:
            runs = ceil(end - start, run)
            if not surely(runs * run == end - start):
                group = F.pad(group, [0, 0, 0, runs * run - (end - start)])
            group = group.reshape(B * 2 * runs, run, C)
            group = torch.bmm(weights[i].expand(group.shape[0], -1, -1), group).view(B, 2, runs, C)
        merged.append(group + biases[i])
        start = end
    return torch.cat(merged, 2)
