"""The peers of window attention, which copy the map into windows and back; timm does so before the projection."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import unpack, window_attention
from .cases import Call
from .contest import Contest, Peer, Projected, flex_attention, products


@dataclass(frozen=True)
class Partition:
    """A partition of a map into windows, which may extend beyond its border."""

    size: tuple[int, int]
    window: tuple[int, int]
    grid: bool

    @property
    def count(self) -> tuple[int, int]:
        return -(-self.size[0] // self.window[0]), -(-self.size[1] // self.window[1])

    @property
    def border(self) -> tuple[int, int]:
        return -self.size[0] % self.window[0], -self.size[1] % self.window[1]

    def cut(self, x: Tensor, outside: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B * windows, tokens, C); zeros, or `outside` (C), where a window has no pixel."""
        if any(self.border):
            beyond = (0, 0, 0, self.border[1], 0, self.border[0])
            x = F.pad(x, beyond)
            if outside is not None:
                x = x + outside * F.pad(torch.zeros_like(x[:1, : self.size[0], : self.size[1], :1]), beyond, value=1)
        (nh, nw), (wh, ww) = self.count, self.window
        if self.grid:
            x = x.reshape(-1, wh, nh, ww, nw, x.shape[-1]).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.reshape(-1, nh, wh, nw, ww, x.shape[-1]).transpose(2, 3)
        return x.reshape(-1, wh * ww, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `cut`, cropped."""
        (nh, nw), (wh, ww) = self.count, self.window
        x = x.reshape(-1, nh, nw, wh, ww, x.shape[-1])
        x = x.permute(0, 3, 1, 4, 2, 5) if self.grid else x.transpose(2, 3)
        return x.reshape(-1, nh * wh, nw * ww, x.shape[-1])[:, : self.size[0], : self.size[1]]

    def hidden(self, device: str, dtype: torch.dtype) -> Tensor:
        """(windows, 1, 1, tokens): -inf outside the map, 0 inside."""
        inside = self.cut(torch.ones(1, *self.size, 1, device=device, dtype=dtype))
        return inside.log().transpose(1, 2).unsqueeze(1)


def contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    heads, dim, window = call.heads, call.dim, call["window"]
    part = Partition(call.size, window, call["grid"])
    count = 2 if call["shared"] else 3
    inputs = {"packed": (batch, *call.size, count, heads, dim)}
    if call["shared"]:
        inputs["query"] = (batch, *window, heads, dim)
    if call["bias"]:
        inputs["bias"] = (heads, 2 * window[0] - 1, 2 * window[1] - 1)
    if call["attend_padding"] and any(part.border):
        inputs["outside"] = (count, heads, dim)

    def op(packed: Tensor, query=None, bias=None, outside=None, impl: str = "auto") -> Tensor:
        q, k, v = unpack(packed) if query is None else (query, *unpack(packed))
        outside = None if outside is None else tuple(outside[-2:])
        partition = "grid" if call["grid"] else "block"
        return window_attention(q, k, v, bias, window, partition, None, outside, impl)

    tensors = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in inputs.items()}
    return Contest(tensors, op, peers(call, part, batch, device, dtype))


class Added:
    """What is added to the logits of windows: a table of relative positions, and -inf for tokens outside the map.

    hidden  (windows of an image, 1, 1, tokens), as `Partition.hidden`; None: all tokens are attended to
    """

    def __init__(self, window: tuple[int, int], batch: int, hidden: Tensor | None, device: str) -> None:
        self.window, self.batch, self.hidden = window, batch, hidden
        place = torch.arange(window[0] * window[1], device=device)
        self.row, self.col = place // window[1], place % window[1]

    def mask(self, bias: Tensor | None) -> Tensor | None:
        """(1 or windows, heads or 1, tokens or 1, tokens)"""
        mask, (row, col), (wh, ww) = None, (self.row, self.col), self.window
        if bias is not None:
            mask = bias[:, row - row[:, None] + wh - 1, col - col[:, None] + ww - 1].unsqueeze(0)
        if self.hidden is not None:
            mask = self.hidden if mask is None else mask + self.hidden
            mask = mask.repeat(self.batch, 1, 1, 1)
        return mask

    def score_mod(self, bias: Tensor | None) -> Callable[..., Tensor] | None:
        """The same as a function for FlexAttention, which takes windows for a batch."""
        if bias is None and self.hidden is None:
            return None
        hidden, (row, col), (wh, ww) = self.hidden, (self.row, self.col), self.window

        def changed(score: Tensor, w: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if bias is not None:
                score = score + bias[h, row[j] - row[i] + wh - 1, col[j] - col[i] + ww - 1]
            return score if hidden is None else score + hidden[w % hidden.shape[0], 0, 0, j]

        return changed


def peers(call: Call, part: Partition, batch: int, device: str, dtype: torch.dtype) -> dict[str, Peer]:
    heads, dim, windows = call.heads, call.dim, batch * part.count[0] * part.count[1]
    masked = any(part.border) and not call["attend_padding"]
    added = Added(call["window"], batch, part.hidden(device, dtype) if masked else None, device)

    def arrange(packed: Tensor, query=None, bias=None, outside=None) -> dict[str, Tensor]:
        cut = part.cut(packed.flatten(3), None if outside is None else outside.flatten())
        # the map that such a layer copies before its projection; its contents do not matter
        given = {"x": packed[..., -1, :, :].flatten(3).detach().clone(), "packed": cut}
        others = {"query": query, "bias": bias}
        return given | {name: t for name, t in others.items() if t is not None}

    def partitioned(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(x: Tensor, packed: Tensor, query=None, bias=None) -> tuple[Tensor, Tensor]:
            packed = packed.unflatten(-1, (-1, heads, dim)).permute(2, 0, 3, 1, 4)  # (3, windows, heads, tokens, D)
            if query is None:
                q, k, v = packed.unbind(0)
            else:
                k, v = packed.unbind(0)
                q = query.flatten(1, 2).transpose(1, 2).repeat_interleave(windows // batch, 0)
            out = part.join(attend(q, k, v, bias).transpose(1, 2).flatten(2))
            return out.unflatten(-1, (heads, dim)), part.cut(x)

        return run

    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, added.mask(bias))

    def copied(packed: Tensor, query=None, bias=None, outside=None) -> Tensor:
        """The simplest way to write it: all three maps are cut into windows, then multiplied."""
        given = None if outside is None else outside.flatten(1)
        cut = [
            part.cut(t.flatten(3), None if given is None else given[i]).unflatten(-1, (heads, dim)).transpose(1, 2)
            for i, t in enumerate(packed.unbind(3))
        ]
        if query is not None:
            cut.insert(0, query.flatten(1, 2).transpose(1, 2).repeat_interleave(windows // batch, 0))
        out = products(*cut, dim**-0.5, added.mask(bias))
        return part.join(out.transpose(1, 2).flatten(2)).unflatten(-1, (heads, dim))

    flexed = flex_attention()
    found = {
        "products": Peer(copied),
        "sdpa": Peer(partitioned(sdpa), arrange),
        "flex": Peer(partitioned(lambda q, k, v, bias: flexed(q, k, v, score_mod=added.score_mod(bias))), arrange),
    }
    module = timm_module(call, device, dtype) if not masked else None
    return found if module is None else found | {"timm": timm_peer(module, call, part, arrange)}


def timm_module(call: Call, device: str, dtype: torch.dtype) -> nn.Module | None:
    """The attention of timm's MaxViT, GC ViT or DaViT without its projections; None if timm has none."""
    width, window = call.heads * call.dim, call["window"]
    if call["bias"] and not call["attend_padding"]:
        from timm.layers import RelPosBiasTf
        from timm.models.maxxvit import AttentionCl

        def table(num_heads: int, **options) -> nn.Module:
            return RelPosBiasTf(window, num_heads, **options)

        module = AttentionCl(width, dim_head=call.dim, head_first=False, rel_pos_cls=table, device=device, dtype=dtype)
    elif call["bias"]:
        from timm.models.gcvit import WindowAttentionGlobal

        module = WindowAttentionGlobal(width, call.heads, window, call["shared"], device=device, dtype=dtype)
    elif call["attend_padding"]:
        from timm.models.davit import WindowAttention

        module = WindowAttention(width, window, call.heads, device=device, dtype=dtype)
    else:
        return None
    module.qkv, module.proj = Projected(), nn.Identity()
    if call["bias"]:
        # replaced by an ordinary attribute, so that each run can assign the table that is to get a gradient
        del module.rel_pos._parameters["relative_position_bias_table"]
    return module


def timm_peer(module: nn.Module, call: Call, part: Partition, arrange: Callable[..., dict[str, Tensor]]) -> Peer:
    def as_timm(query=None, bias=None, **inputs: Tensor) -> dict[str, Tensor]:
        given = arrange(query=query, bias=bias, **inputs)
        if bias is not None and call["attend_padding"]:
            given["bias"] = bias.flip(1, 2).flatten(1).T  # Swin's tables are indexed by query - key
        if query is not None:
            given["query"] = query.flatten(1, 2).flatten(2)
        return given

    def run(x: Tensor, packed: Tensor, query=None, bias=None) -> tuple[Tensor, Tensor]:
        if bias is not None:
            module.rel_pos.relative_position_bias_table = bias
        cut, module.qkv.given = part.cut(x), packed
        out = module(cut) if query is None else module(cut, query)
        return part.join(out).unflatten(-1, (call.heads, call.dim)), cut

    return Peer(run, as_timm)
