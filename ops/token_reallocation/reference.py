"""The specification of token reallocation: attention received, stable ranking, merging by rank."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import wide
from ..onnx_export import for_onnx
from ..sizes import filled


def received(q: Tensor, k: Tensor, window: tuple[int, int] | None, scale: float) -> Tensor:
    """(B, h, w); the arguments are those of `ops.significance`."""
    if window is None:
        logits = scale * torch.einsum("byxhd, bjhd -> bhyxj", q, k.flatten(1, 2))
        return logits.softmax(-1, dtype=wide(q.dtype)).mean([1, 2, 3]).unflatten(-1, [k.shape[1], k.shape[2]])
    H, W = q.shape[1], q.shape[2]
    q, k = cut(q, window), cut(k, window)  # (B, gh, gw, tokens, heads, D)
    inside = cut(torch.ones([1, H, W, 1, 1], dtype=q.dtype, device=q.device), window)
    inside = inside[0, :, :, :, 0, 0]  # (gh, gw, tokens)
    logits = scale * torch.einsum("byxihd, byxjhd -> byxhij", q, k)
    logits = logits.masked_fill(inside[:, :, None, None, :] == 0, float("-inf"))
    received = logits.softmax(-1, dtype=wide(q.dtype)) * inside[:, :, None, :, None]
    mean = received.sum(4).mean(3) / inside.sum(2)[:, :, None]  # (B, gh, gw, tokens)
    return mean.unflatten(3, [window[0], window[1]]).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]


def cut(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, D) -> (B, gh, gw, tokens, heads, D), padded with zeros to whole windows."""
    x = filled(x, window).unflatten(2, [-1, window[1]]).unflatten(1, [-1, window[0]])
    return x.transpose(2, 3).flatten(3, 4)


def rank(significance: Tensor) -> Tensor:
    """(B, H, W) -> (B, 2, H * W): pixel indices in ascending order, ties in row-major and in column-major order."""
    H, W = significance.shape[1], significance.shape[2]
    values = significance.detach()
    # a single sort: a GPU has room for both orders at a time
    order = ascending(torch.stack([values.flatten(1), values.transpose(1, 2).flatten(1)], 1))
    column = order[:, 1] // H  # the row is computed by subtraction: ONNX has no remainder by an unknown size
    return torch.stack([order[:, 0], (order[:, 1] - column * H) * W + column], 1)


def ascending(values: Tensor) -> Tensor:
    """The indices that sort the last axis in ascending order, stably."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if for_onnx():
            # ONNX only has a stable sort, but the exporter does not support the overload that asks for it
            return values.argsort(dim=-1)
    return values.argsort(dim=-1, stable=True)


def merge(x: Tensor, order: Tensor, weights: list[Tensor], biases: list[Tensor], shares: list[int]) -> Tensor:
    """(B, M, C): the tokens of `x` in the given order (B, H * W), merged group by group."""
    tokens = x.flatten(1, 2).gather(1, order[:, :, None].expand(-1, -1, x.shape[3]))
    merged, start, share = [], 0, 0
    for i in range(len(shares)):
        share += shares[i]
        end, run = tokens.shape[1] * share // sum(shares), weights[i].numel()
        group = F.pad(tokens[:, start:end], [0, 0, 0, (start - end) % run]).unflatten(1, [-1, run])
        merged.append(torch.einsum("bmrc, r -> bmc", group, weights[i].flatten()) + biases[i])
        start = end
    return torch.cat(merged, 1)
