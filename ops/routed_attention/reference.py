"""The specification of routed attention: the keys of the chosen regions are gathered, then attended."""

import torch
from torch import Tensor

from ..dispatch import autocasts, wide
from ..sizes import laid_out


def attend(q: Tensor, k: Tensor, v: Tensor, regions: tuple[int, int], route: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.routed_attention`."""
    H, W = q.shape[1], q.shape[2]
    q, k, v = cut(q, regions), cut(k, regions), cut(v, regions)  # (B, R, pixels, heads, D)
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    k, v = k[image, route].flatten(2, 3), v[image, route].flatten(2, 3)  # (B, R, topk * pixels, heads, D)
    logits = scale * torch.einsum("brihd, brjhd -> brhij", q, k)
    out = torch.einsum("brhij, brjhd -> brihd", logits.softmax(-1), v)
    return join(out, regions, H, W)


def rank(q: Tensor, k: Tensor, regions: tuple[int, int], topk: int) -> Tensor:
    """(B, R, topk): the regions with the largest dot products of mean query and mean key, in float32 at least."""
    q, k = mean(q.detach(), regions), mean(k.detach(), regions)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if autocasts(q):
            with torch.autocast(q.device.type, enabled=False):  # it would round what is to be ranked
                return (q @ k.transpose(1, 2)).topk(topk, dim=-1).indices
    return (q @ k.transpose(1, 2)).topk(topk, dim=-1).indices


def mean(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, D) -> (B, R, heads * D): the mean of the pixels of each region."""
    return cut(x, regions).mean(2, dtype=wide(x.dtype)).flatten(2)


def cut(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, D) -> (B, R, pixels of a region, heads, D)."""
    B, H, W, heads, D = x.shape
    rows, cols = regions
    x = x.reshape(B, rows, H // rows, cols, W // cols, heads, D).transpose(2, 3)
    return laid_out(x).reshape(B, rows * cols, (H // rows) * (W // cols), heads, D)


def join(x: Tensor, regions: tuple[int, int], H: int, W: int) -> Tensor:
    """The inverse of `cut`."""
    rows, cols = regions
    B, heads, D = x.shape[0], x.shape[3], x.shape[4]
    x = x.reshape(B, rows, cols, H // rows, W // cols, heads, D).transpose(2, 3)
    return x.reshape(B, H, W, heads, D)
