"""The peers of super tokens and of token reallocation for `ops.bench`: what their authors' code does, step by step."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import rank_tokens, reallocate_tokens, scatter_super_tokens, significance, super_tokens

Peer = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]  # rows, columns, channels


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, M, C)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def super_token_attention(
    *, batch: int, shape: Shape, cell: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, nn.Module, dict[str, Peer]]:
    """An input (B, H, W, C), the weights, and the peers by name; the first is what the others must agree with."""
    H, W, C = shape
    h, w = -(-H // cell), -(-W // cell)
    layer = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C), "proj": nn.Linear(C, C)}).to(device, dtype)
    x = torch.randn(batch, H, W, C, device=device, dtype=dtype)

    def refine(tokens: Tensor) -> Tensor:  # (B, h * w, C)
        return layer["proj"](attend(*layer["qkv"](tokens).chunk(3, -1), heads=C // 64))

    def ours(x: Tensor) -> Tensor:
        tokens, affinity = super_tokens(x, (cell, cell))
        tokens = refine(tokens.flatten(1, 2)).unflatten(1, (h, w))
        return scatter_super_tokens(tokens, affinity, (cell, cell))

    def nine(tokens: Tensor) -> Tensor:  # (B, C, h, w) -> (B, h * w, C, 9)
        return F.unfold(tokens, 3, padding=1).view(batch, C, 9, h * w).permute(0, 3, 1, 2)

    def back(parts: Tensor) -> Tensor:  # (B, h * w, C, 9) -> (B, C, h, w)
        return F.fold(parts.permute(0, 2, 3, 1).flatten(1, 2), (h, w), 3, padding=1)

    def unfolded(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, w * cell - W, 0, h * cell - H)).view(batch, h, cell, w, cell, C)
        pixels = x.transpose(2, 3).reshape(batch, h * w, cell * cell, C)
        with torch.no_grad():
            means = pixels.mean(2).transpose(1, 2).unflatten(2, (h, w))
            affinity = (pixels @ nine(means) * C**-0.5).softmax(-1)
            total = back(affinity.sum(2).unsqueeze(2))
        tokens = back(pixels.mT @ affinity) / (total + 1e-12)
        tokens = refine(tokens.flatten(2).mT).mT.unflatten(2, (h, w))
        out = (affinity @ nine(tokens).mT).view(batch, h, w, cell, cell, C)
        return out.transpose(2, 3).reshape(batch, h * cell, w * cell, C)[:, :H, :W]

    return x, layer, {"ours": ours, "unfold": unfolded}


def token_reallocation(
    *, batch: int, shape: Shape, runs: tuple[int, ...], shares: tuple[int, ...], device: str, dtype: torch.dtype
) -> tuple[Tensor, nn.Module, dict[str, Peer]]:
    """As `super_token_attention`; the significance is given. Runs must divide the groups that `shares` cut."""
    H, W, C = shape
    layer = nn.ModuleDict({name: nn.Linear(C, C) for name in ("q", "kv1", "kv2", "proj")})
    layer["merge"] = nn.ModuleList(nn.Linear(run, 1) for run in runs)
    layer.to(device, dtype)
    x = torch.randn(batch, H, W, C, device=device, dtype=dtype)
    # no two tokens alike: the authors' sort leaves the order of equal ones open, that of `ours` is stable
    given = torch.stack([torch.randperm(H * W, device=device) for _ in range(batch)]).view(batch, H, W)

    def guided(x: Tensor, merged: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        halves = [layer[name](tokens).chunk(2, -1) for name, tokens in zip(("kv1", "kv2"), merged(x), strict=True)]
        k, v = (torch.cat(pair, -1) for pair in zip(*halves, strict=True))
        out = attend(layer["q"](x.flatten(1, 2)), k, v, heads=C // 32)
        return layer["proj"](out).view_as(x)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases = [f.weight for f in layer["merge"]], [f.bias for f in layer["merge"]]
        return reallocate_tokens(x, None, weights, biases, list(shares), rank_tokens(given))

    def gathered(x: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [H * W * share // sum(shares) for share in shares]
        sequences = []
        for tokens, values in ((x, given), (x.transpose(1, 2), given.mT)):
            order = values.flatten(1).sort(1).indices
            ranked = tokens.flatten(1, 2).gather(1, order[:, :, None].expand(-1, -1, C))
            groups = zip(ranked.split(sizes, 1), layer["merge"], strict=True)
            sequences.append(torch.cat([f(g.unflatten(1, (-1, f.in_features)).mT).squeeze(-1) for g, f in groups], 1))
        return sequences[0], sequences[1]

    return x, layer, {name: partial(guided, merged=way) for name, way in (("ours", ours), ("gather", gathered))}


def received(
    *, batch: int, shape: Shape, reduction: int, window: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, nn.Module, dict[str, Peer]]:
    """As `super_token_attention`; the significance, which has no gradient, is a factor on x. Windows must divide."""
    H, W, C = shape
    heads, h, w = C // 64, H // reduction, W // reduction
    x = torch.randn(batch, H, W, C, device=device, dtype=dtype)
    q, near = (torch.randn(batch, H, W, heads, 32, device=device, dtype=dtype) for _ in range(2))
    far = torch.randn(batch, h, w, heads, 32, device=device, dtype=dtype)

    def spread(far: Tensor, near: Tensor) -> Tensor:
        return (F.interpolate(far.unsqueeze(1), (H, W)).squeeze(1) + near).unsqueeze(-1)

    def ours(x: Tensor) -> Tensor:
        return x * spread(significance(q, far), significance(q, near, (window, window)))

    def windows(x: Tensor) -> Tensor:  # (B, H, W, heads, 32) -> (B, groups, heads, tokens, 32)
        x = x.view(batch, H // window, window, W // window, window, heads, 32)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)

    def softmax(x: Tensor) -> Tensor:
        tokens = [t.flatten(1, 2).transpose(1, 2) for t in (q, far)]
        to_all = (tokens[0] @ tokens[1].mT * 32**-0.5).softmax(-1).mean((1, 2)).view(batch, h, w)
        inside = (windows(q) @ windows(near).mT * 32**-0.5).softmax(-1).mean((2, 3))
        inside = inside.view(batch, H // window, W // window, window, window).transpose(2, 3)
        return x * spread(to_all, inside.reshape(batch, H, W))

    return x, nn.Module(), {"ours": ours, "softmax": softmax}
