"""The peers that `ops.bench` times an op against, each a function of the same input and the same weights."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import neighborhood_attention as ours_neighborhood_attention
from . import route_regions
from . import routed_attention as ours_routed_attention
from . import window_attention as ours_window_attention

Peer = Callable[[Tensor], Tensor]


class Weights(nn.Module):
    """The parameters of one attention layer with a table of relative positions."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(heads, 2 * window - 1, 2 * window - 1))


def window_attention(
    *, batch: int, size: int, dim: int, window: int, grid: bool, device: str, dtype: torch.dtype
) -> tuple[Tensor, nn.Module, dict[str, Peer]]:
    """An input (B, H, W, C), the weights, and the peers by name; the first is what the others must agree with."""
    heads, tokens = dim // 32, window * window
    w = Weights(dim, heads, window).to(device, dtype)
    x = torch.randn(batch, size, size, dim, device=device, dtype=dtype)
    n = size // window

    def ours(x: Tensor) -> Tensor:
        q, k, v = w.qkv(x).unflatten(-1, (3, heads, 32)).unbind(3)
        partition = "grid" if grid else "block"
        return w.proj(ours_window_attention(q, k, v, w.bias, window=(window, window), partition=partition).flatten(3))

    def to_windows(x: Tensor) -> Tensor:  # (B, H, W, C) -> (B * groups, N, C)
        shape = (batch, window, n, window, n, -1) if grid else (batch, n, window, n, window, -1)
        x = x.view(shape)
        x = x.permute(0, 2, 4, 1, 3, 5) if grid else x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch * n * n, tokens, -1)

    def from_windows(x: Tensor) -> Tensor:
        x = x.view(batch, n, n, window, window, -1)
        x = x.permute(0, 3, 1, 4, 2, 5) if grid else x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, size, size, -1)

    place = torch.arange(tokens, device=device)
    row, col = place // window, place % window

    def projected(x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = w.qkv(to_windows(x)).unflatten(-1, (3, heads, 32)).permute(2, 0, 3, 1, 4)
        return from_windows(w.proj(attend(q, k, v).transpose(1, 2).flatten(2)))

    def sdpa(x: Tensor) -> Tensor:
        bias = w.bias[:, row - row[:, None] + window - 1, col - col[:, None] + window - 1]
        mask = bias.expand(batch * n * n, -1, -1, -1).contiguous()
        return projected(x, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))

    def flex(x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + w.bias[h, row[j] - row[i] + window - 1, col[j] - col[i] + window - 1]

        compiled = torch.compile(flex_attention, dynamic=False)
        return projected(x, lambda q, k, v: compiled(q, k, v, score_mod=add_bias))

    return x, w, {"ours": ours, "timm": timm_window_attention(w, dim, window, grid), "sdpa": sdpa, "flex": flex}


def timm_window_attention(w: Weights, dim: int, window: int, grid: bool) -> Peer:
    """timm's MaxViT attention, channels last with TensorFlow's bias table, holding the very parameters of `w`."""
    from timm.layers import RelPosBiasTf
    from timm.models import maxxvit

    table = partial(RelPosBiasTf, (window, window))
    layer = maxxvit.AttentionCl(dim, dim_head=32, head_first=False, rel_pos_cls=table).to(w.bias.device, w.bias.dtype)
    layer.qkv, layer.proj, layer.rel_pos.relative_position_bias_table = w.qkv, w.proj, w.bias
    there = maxxvit.grid_partition if grid else maxxvit.window_partition
    back = maxxvit.grid_reverse if grid else maxxvit.window_reverse
    sides = [window, window]
    return lambda x: back(layer(there(x, sides)), sides, list(x.shape[1:3]))


def neighborhood_attention(
    *, batch: int, size: int, dim: int, window: int, dilation: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, nn.Module, dict[str, Peer]]:
    """As `window_attention`, for square maps that the dilation divides."""
    heads, d, n = dim // 32, dilation, size // dilation
    w = Weights(dim, heads, window).to(device, dtype)
    x = torch.randn(batch, size, size, dim, device=device, dtype=dtype)

    def projected(x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return w.proj(attend(*w.qkv(x).unflatten(-1, (3, heads, 32)).unbind(3)).flatten(3))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours_neighborhood_attention(q, k, v, w.bias, window=window, dilation=d)

    place = torch.arange(n, device=device)
    first = (place - window // 2).clamp(0, n - window)
    step = first[:, None] + torch.arange(window, device=device) - place[:, None] + window - 1

    def lines(x: Tensor) -> Tensor:  # (B, H, W, heads, D) -> (B * d * d, n, n, heads, D)
        return x.view(batch, n, d, n, d, heads, 32).permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, n, n, heads, 32)

    def unfolded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = lines(q), *(lines(t).unfold(1, window, 1).unfold(2, window, 1)[:, first][:, :, first] for t in (k, v))
        bias = w.bias[:, step[:, None, :, None], step[None, :, None, :]]  # (heads, n, n, window, window)
        logits = torch.einsum("byxhd, byxhdij -> bhyxij", q * 32**-0.5, k) + bias
        attention = logits.flatten(4).softmax(-1).view_as(logits)
        out = torch.einsum("bhyxij, byxhdij -> byxhd", attention, v)
        return out.view(batch, d, d, n, n, heads, 32).permute(0, 3, 1, 4, 2, 5, 6).flatten(3, 4).flatten(1, 2)

    def natten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from natten.functional import na2d_av, na2d_qk  # they end with version 0.17

        q, k, v = (t.permute(0, 3, 1, 2, 4).contiguous() for t in (q * 32**-0.5, k, v))
        attention = na2d_qk(q, k, window, d, rpb=w.bias).softmax(-1)
        return na2d_av(attention, v, window, d).permute(0, 2, 3, 1, 4)

    peers = {"ours": ours, "unfold": unfolded, "natten": natten}
    return x, w, {name: partial(projected, attend=attend) for name, attend in peers.items()}


def routed_attention(
    *, batch: int, size: tuple[int, int], dim: int, topk: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, nn.Module, dict[str, Peer]]:
    """As `window_attention`, for 7 x 7 regions that divide the map; all peers share one routing."""
    heads, regions, (H, W) = dim // 32, (7, 7), size
    w = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)}).to(device, dtype)
    x = torch.randn(batch, H, W, dim, device=device, dtype=dtype)
    image = torch.arange(batch, device=device)[:, None, None]

    def projected(x: Tensor, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = w["qkv"](x).unflatten(-1, (3, heads, 32)).unbind(3)
        return w["proj"](attend(q, k, v, route_regions(q, k, regions, topk)).flatten(3))

    def ours(q: Tensor, k: Tensor, v: Tensor, route: Tensor) -> Tensor:
        return ours_routed_attention(q, k, v, regions, topk, route, dim**-0.5)

    def cut(x: Tensor) -> Tensor:  # (B, H, W, heads, D) -> (B, R, P, heads, D)
        return x.reshape(batch, 7, H // 7, 7, W // 7, heads, 32).transpose(2, 3).reshape(batch, 49, -1, heads, 32)

    def copied(q: Tensor, k: Tensor, v: Tensor, route: Tensor, attend: Callable) -> Tensor:
        k, v = (cut(t)[image, route].flatten(2, 3) for t in (k, v))  # (B, R, topk * P, heads, D)
        out = attend(*(t.transpose(2, 3) for t in (cut(q), k, v))).transpose(2, 3)
        return out.reshape(batch, 7, 7, H // 7, W // 7, heads, 32).transpose(2, 3).reshape(batch, H, W, heads, 32)

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * dim**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v

    sdpa = partial(F.scaled_dot_product_attention, scale=dim**-0.5)
    peers = {"ours": ours, "gathered": partial(copied, attend=products), "sdpa": partial(copied, attend=sdpa)}
    return x, w, {name: partial(projected, attend=attend) for name, attend in peers.items()}
