"""SG-Former: Self-guided Transformer with Evolving Token Reallocation, https://arxiv.org/abs/2308.12216

Blocks come in pairs. The first attends to a reduced map and inside windows, and records how much attention each token
receives; the second merges tokens by that rank, more of them the less they matter, and attends to the merged tokens.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_function
from timm.models._input import update_model_input_size
from torch import Tensor, fx, nn

from ops import pooled_attention, rank_tokens, reallocate_tokens, significance, unpack, window_attention

from .backbone import Backbone, Head, Stage
from .blocks import (
    ConvPosition,
    Mlp,
    Nhwc,
    PositionTable,
    Residual,
    check_model,
    drop_path_rates,
    image_sides,
    init_fan_out,
    is_plain,
    map_sides,
    recomputed,
)
from .registry import register

for op in (pooled_attention, rank_tokens, reallocate_tokens, significance, unpack, window_attention):
    fx.wrap(op)
    register_notrace_function(op)

# Table 1 and the authors' code
VARIANTS = {
    #              channels and blocks of each stage                            attention heads
    "sgformer_s": {"dims": (64, 128, 256, 512), "depths": (2, 4, 16, 1), "heads": (2, 4, 8, 16),  "img_size": 224},
    "sgformer_m": {"dims": (64, 128, 256, 512), "depths": (2, 6, 28, 2), "heads": (2, 4, 8, 16),  "img_size": 224},
    "sgformer_b": {"dims": (96, 192, 384, 768), "depths": (4, 6, 24, 2), "heads": (4, 6, 12, 24), "img_size": 224},
}  # fmt: skip

# of each of the first three stages: the reduction of the reduced map along a side; tokens of a run in each group of
# merged tokens, and relative sizes of these groups, least significant first
STAGES = ((8, (196, 56, 28), (1, 2, 1)), (4, (49, 14, 7), (1, 2, 1)), (2, (2, 1), (1, 1)))


class Stem(nn.Module):
    """Three 3 x 3 convolutions, the first and third of stride 2; then positions are added."""

    def __init__(self, in_chans: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(in_chans, dim, 3, 2, 1, bias=False), nn.GroupNorm(1, dim)
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.GroupNorm(1, dim)
        self.conv3, self.norm3 = nn.Conv2d(dim, dim, 3, 2, 1, bias=False), nn.GroupNorm(1, dim)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim)
        self.position = PositionTable(dim, grid)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        return self.position(self.norm(self.norm3(self.conv3(x)).permute(0, 2, 3, 1)))


class Attention(nn.Module):
    """What the three kinds share: a convolution beside the heads; all pass on the tokens' significance."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads or heads % 2:
            raise ValueError(f"dim is {dim}, heads {heads}: expected an even number of heads that divides dim")
        self.heads = heads
        conv = Nhwc(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim))
        self.lepe = nn.Sequential(OrderedDict(linear=nn.Linear(dim, dim), conv=conv))
        self.proj = nn.Linear(dim, dim)

    def project(self, heads: Tensor, x: Tensor) -> Tensor:  # (B, H, W, heads, D), (B, H, W, C) -> (B, H, W, C)
        return self.proj(heads.flatten(3) + self.lepe(x))


class HybridAttention(Attention):
    """Figure 3: half of the heads attend to a reduced map, half inside windows.

    Significance is the attention that a token receives in its window and that its place in the reduced map receives.
    """

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__(dim, heads)
        self.window = (7, 7)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
        self.norm, self.act = nn.LayerNorm(dim), nn.GELU()
        self.q1, self.kv1 = nn.Linear(dim, dim // 2), nn.Linear(dim, dim)
        self.q2, self.kv2 = nn.Linear(dim, dim // 2), nn.Linear(dim, dim)

    def forward(self, x: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, W, C), (B, H, W)
        reduced = self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        half = self.heads // 2
        q1, q2 = self.q1(x).unflatten(-1, [half, -1]), self.q2(x).unflatten(-1, [half, -1])  # (B, H, W, heads / 2, D)
        k1, v1 = self.kv1(self.act(self.norm(reduced))).unflatten(-1, [2, half, -1]).unbind(3)
        k2, v2 = unpack(self.kv2(x).unflatten(-1, [2, half, -1]))
        heads = [pooled_attention(q1, k1, v1), window_attention(q2, k2, v2, None, self.window)]
        received = F.interpolate(significance(q1, k1).unsqueeze(1), x.shape[1:3], mode="nearest").squeeze(1)
        return self.project(torch.cat(heads, 3), x), received + significance(q2, k2, self.window)


def learned_sum(layer: nn.Module, run: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (1, run) and bias (1,) of the layer that merges a run of tokens, for a map like x.

    Both are obtained by calling the layer on zeros and units if it is not a linear layer, or if it has a hook, which
    nothing else would run: pruning and weight norm compute the weight in one.
    """
    if is_plain(layer):
        return layer.weight, layer.bias
    bias = layer(x.new_zeros([1, run]))[0]
    return (layer(torch.eye(run, dtype=x.dtype, device=x.device)) - bias).T, bias


class GuidedAttention(Attention):
    """Figure 4: attention to merged tokens; half of the heads see them ordered by rows, half by columns."""

    def __init__(self, dim: int, heads: int, runs: Sequence[int], shares: Sequence[int]) -> None:
        super().__init__(dim, heads)
        self.runs, self.shares = list(runs), list(shares)
        self.merge = nn.ModuleList(nn.Linear(run, 1) for run in runs)
        self.q = nn.Linear(dim, dim)
        self.kv1, self.kv2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, W, C), (B, H, W)
        weights, biases = [], []
        for i, layer in enumerate(self.merge):
            if torch.jit.is_scripting():
                weight, bias = layer.weight, layer.bias
            else:
                weight, bias = learned_sum(layer, self.runs[i], x)
            weights.append(weight)
            biases.append(bias)
        order = rank_tokens(significance)
        by_rows, by_columns = reallocate_tokens(x, None, weights, biases, self.shares, order)  # (B, M, C)
        halves = [self.kv1(by_rows), self.kv2(by_columns)]
        kv = torch.cat([half.unflatten(-1, [2, self.heads // 2, -1]) for half in halves], 3)
        k, v = kv.unbind(2)  # (B, M, heads, D)
        heads = pooled_attention(self.q(x).unflatten(-1, [self.heads, -1]), k, v)
        return self.project(heads, x), significance


class PlainAttention(Attention):
    """All tokens attend to all."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, W, C), (B, H, W)
        k, v = self.kv(x).unflatten(-1, [2, self.heads, -1]).unbind(3)  # (B, H, W, heads, D)
        heads = pooled_attention(self.q(x).unflatten(-1, [self.heads, -1]), k, v)
        return self.project(heads, x), significance


class ConvMlp(Mlp):
    """An MLP that adds positions to the hidden units before the activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.pos = ConvPosition(hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return self.fc2(self.act(self.pos(self.fc1(x))))


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self, dim: int, attention: Attention, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.mlp = Residual(nn.LayerNorm(dim, 1e-6), ConvMlp(dim, 4 * dim), drop_path=drop_path)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, W, C), (B, H, W)
        out, significance = self.attn(self.norm(x), significance)
        return self.mlp(x + self.drop_path(out)), significance


class GuidedStage(Stage):
    """A stage whose blocks pass on the significance of its tokens."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module | None, norm: nn.Module) -> None:
        super().__init__((), downsample=downsample, norm=norm)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = self.downsample(x)
        significance = x[..., 0]  # not read before a block has computed it
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, significance = recomputed(block, x, significance)
            else:
                x, significance = block(x, significance)
        return self.norm(x)


class SGFormer(Backbone):
    """Input (B, in_chans, H, W), output (B, num_classes).

    dims, depths, heads  channels, blocks and attention heads of each stage, at most four. In all but the fourth, blocks
                    with even numbers compute the significance that the next one uses; stages do not share it
    img_size        image that the table of positions is made for, pixels a side or (height, width). By default,
                    released weights run on 112 x 448 as published, with the table of 224 x 224 read in order, since
                    there are as many tokens; with img_size=(112, 448) it is interpolated to that map
    drop_path_rate  a linear ramp from 0 over all blocks
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`; the authors published no version for dense prediction

    A built model runs at any size; the published code takes sides that are multiples of 112, and only if the number of
    tokens in the third stage is a multiple of 4: neither 112 x 112 nor 336 x 336. If the table has as many entries as
    the map has tokens it is read in order, as published, else interpolated. Windows at the border are cut off. The
    reduced map drops incomplete pixels at the bottom and right, as published. The last run of a group is padded with
    zeros, and groups end at their shares of the tokens, rounded down.

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 16, 1),
        heads: Sequence[int] = (2, 4, 8, 16),
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, dims=dims, depths=depths, heads=heads)
        if len(dims) > len(STAGES) + 1:
            raise ValueError(f"dims is {tuple(dims)}: expected at most {len(STAGES) + 1} stages")
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [Block(dims[i], attention(dims[i], heads[i], i, j), rate) for j, rate in enumerate(rates)]
            downsample = halve(dims[i - 1], dims[i]) if i else None
            stages.append(GuidedStage(blocks, downsample, nn.LayerNorm(dims[i], 1e-6)))
        super().__init__(
            Stem(in_chans, dims[0], map_sides(image_sides(img_size), 4)),
            stages,
            Head(dims[-1], num_classes, pool=global_pool, drop_rate=drop_rate),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.init_layers()

    def init_layers(self) -> None:
        self.apply(init_fan_out)

    @staticmethod
    def min_img_size_for(stages: int) -> int:
        return 29  # the first stage's map, a quarter of that, is reduced by 8 without padding

    @staticmethod
    def args_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The image size, in whole pixels of the first map, whose table of positions has as many entries; empty if no
        square one has.
        """
        shape = shapes.get("stem.position.table", ())
        side = math.isqrt(shape[1]) if len(shape) == 3 else 0
        return {"img_size": 4 * side} if side and side * side == shape[1] else {}

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Change the table of positions for another image size; it is interpolated."""
        self.img_size = self.img_size if img_size is None else image_sides(img_size)
        self.stem.position.set_grid(map_sides(self.img_size, 4))
        update_model_input_size(self, self.img_size)


def halve(dim: int, dim_out: int) -> Nhwc:
    """Widen, halve the map, mix channels; a norm after each."""
    layers = OrderedDict()
    layers |= {"conv1": nn.Conv2d(dim, dim_out, 1, bias=False), "norm1": nn.GroupNorm(1, dim_out), "act1": nn.GELU()}
    conv = nn.Conv2d(dim_out, dim_out, 3, 2, 1, groups=dim_out, bias=False)
    layers |= {"conv2": conv, "norm2": nn.GroupNorm(1, dim_out), "act2": nn.GELU()}
    layers |= {"conv3": nn.Conv2d(dim_out, dim_out, 1, bias=False), "norm3": nn.GroupNorm(1, dim_out)}
    return Nhwc(layers)


def attention(dim: int, heads: int, stage: int, index: int) -> Attention:
    """The attention of block `index` in a stage: alternately hybrid and guided, in the fourth stage plain."""
    if stage == len(STAGES):
        return PlainAttention(dim, heads)
    reduction, runs, shares = STAGES[stage]
    return GuidedAttention(dim, heads, runs, shares) if index % 2 else HybridAttention(dim, heads, reduction)


register(SGFormer, VARIANTS)
