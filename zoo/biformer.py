"""BiFormer: Vision Transformer with Bi-Level Routing Attention, https://arxiv.org/abs/2303.08810

The map is divided into 7 x 7 regions. Means of their queries and keys determine which few regions each region is most
related to; its pixels then attend to all pixels of those. Regions shrink with the map, their number does not.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops import pooled_attention, route_regions, routed_attention
from ops.dispatch import wide
from ops.sizes import cropped, filled, varies

from .backbone import Backbone, Head, Stage
from .blocks import (
    ChainStem,
    ConvPosition,
    Halve,
    Mlp,
    Nhwc,
    Residual,
    check_count,
    check_heads,
    check_model,
    drop_path_rates,
    hidden_units,
    init_linear,
    window_sides,
)
from .registry import register

for op in (cropped, filled, pooled_attention, route_regions, routed_attention):
    fx.wrap(op)
    register_notrace_function(op)

# Table 1 and the authors' code: heads are 32 wide in the first three stages, and always eight in the last
VARIANTS = {
    "biformer_t": {"dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2), "heads": (2, 4, 8, 8), "img_size": 224},
    "biformer_s": {"dims": (64, 128, 256, 512), "depths": (4, 4, 18, 4), "heads": (2, 4, 8, 8), "img_size": 224},
    "biformer_b": {"dims": (96, 192, 384, 768), "depths": (4, 4, 18, 4), "heads": (3, 6, 12, 8), "img_size": 224},
}
# "Swin-T layout", for comparison with Swin
STL = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 8), "mlp_ratio": 4, "img_size": 224}


class Stem(ChainStem):
    """Two 3 x 3 convolutions of stride 2, each with a norm, and an activation between them."""

    def __init__(self, in_chans: int, dim: int) -> None:
        layers = OrderedDict(
            conv1=nn.Conv2d(in_chans, dim // 2, 3, 2, 1), norm1=nn.BatchNorm2d(dim // 2), act=nn.GELU()
        )
        super().__init__(layers | {"conv2": nn.Conv2d(dim // 2, dim, 3, 2, 1), "norm2": nn.BatchNorm2d(dim)})


class StlStem(ChainStem):
    """A convolution over patches of 4 x 4 pixels, then a norm; incomplete patches are dropped, as published."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(OrderedDict(conv1=nn.Conv2d(in_chans, dim, 4, 4), norm1=nn.BatchNorm2d(dim)))


class PatchMerge(Nhwc):
    """A norm, then a convolution over patches of 2 x 2 pixels; incomplete patches are dropped, as published."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(OrderedDict(norm=nn.BatchNorm2d(dim), conv=nn.Conv2d(dim, dim_out, 2, 2)))


class Attention(nn.Module):
    """The layers of both kinds of attention: two projections, and a convolution that is added to the heads' output."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.lepe = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim)
        self.proj = nn.Linear(dim, dim)


class RoutedAttention(Attention):
    """Section 3.2. Logits are scaled by the full width, not that of a head; the convolution reads the values."""

    def __init__(self, dim: int, heads: int, n_win: int | tuple[int, int], topk: int) -> None:
        super().__init__(dim, heads, bias=True)
        self.n_win = window_sides(n_win, "n_win", "region")
        check_count("topk", topk, "regions that a region attends to")
        self.topk = min(topk, self.n_win[0] * self.n_win[1])
        self.scale = dim**-0.5

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        h, w = x.shape[1], x.shape[2]
        # zeros before the projection: in the padding, queries, keys and values are its bias, and count everywhere
        qkv = self.qkv(filled(x, self.n_win))
        q, k, v = qkv.unflatten(3, [3, self.heads, -1]).unbind(3)  # (B, H, W, heads, D)
        route = route_regions(q, k, self.n_win, self.topk)
        out = routed_attention(q, k, v, self.n_win, self.topk, route, self.scale).flatten(3)
        out = out + self.lepe(v.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(cropped(out, h, w))


@fx.wrap
@register_notrace_function
def floor_regions(h: int, w: int, n_win: tuple[int, int], topk: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Sides of a region, floor(side / n_win) but at least 1; how many regions cover h x w; topk, limited to these."""
    size = (max(h // n_win[0], 1), max(w // n_win[1], 1))
    regions = (-(-h // size[0]), -(-w // size[1]))
    return size, regions, min(topk, regions[0] * regions[1])


@fx.wrap
@register_notrace_function
def region_means(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Means over the pixels of each region, padding left out: (B, h, w, C) -> (B, regions, regions, C).

    They are only ranked: computed at least in float32, since half precision would round to ties, and without gradient.
    """
    x = x.detach().to(wide(x.dtype)).permute(0, 3, 1, 2)
    x = F.avg_pool2d(x, [size[0], size[1]], ceil_mode=True, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


def check_one_size(h: int, w: int) -> None:
    """Raise ValueError on export of a program for any size: its regions, which it pools, would vary in number."""
    if torch.compiler.is_exporting() and (varies(h) or varies(w)):
        raise ValueError("the number of regions depends on the size of the image: no single program serves all sizes")


class FloorRoutedAttention(RoutedAttention):
    """As in the authors' NCHW code: regions of floor(side / n_win) pixels, as many as it takes to cover the map.

    Projected maps are padded with zeros to whole regions: zero keys, which are attended. Means leave them out.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, h, w, C)
        h, w = x.shape[1], x.shape[2]
        if not torch.jit.is_scripting():
            check_one_size(h, w)
        size, regions, topk = floor_regions(h, w, self.n_win, self.topk)
        qkv = self.qkv(x)
        v = qkv[..., 2 * x.shape[3] :]
        # with v, which takes less time than a copy without it
        means = region_means(qkv, size).unflatten(3, [3, self.heads, -1])  # (B, regions, regions, 3, heads, D)
        route = route_regions(means[:, :, :, 0], means[:, :, :, 1], regions, topk)
        q, k, padded = filled(qkv, size).unflatten(3, [3, self.heads, -1]).unbind(3)  # (B, H, W, heads, D)
        out = routed_attention(q, k, padded, regions, topk, route, self.scale).flatten(3)[:, :h, :w]
        return self.proj(out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class FullAttention(Attention):
    """All pixels attend to all; the convolution reads the input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        q, k, v = self.qkv(x).unflatten(3, [3, self.heads, -1]).unbind(3)  # (B, H, W, heads, D)
        beside = self.lepe(self.beside(x, v).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(pooled_attention(q, k, v).flatten(3) + beside)

    def beside(self, x: Tensor, v: Tensor) -> Tensor:
        return x


class ValueFullAttention(FullAttention):
    """The same with a convolution that reads the values, as in the authors' NCHW code."""

    def beside(self, x: Tensor, v: Tensor) -> Tensor:
        return v.flatten(3)


class BiFormer(Backbone):
    """Input (B, in_chans, H, W), output (B, num_classes).

    dims, depths, heads  channels, blocks and attention heads of each stage
    topk            regions that a region attends to, or all if there are fewer, in each stage but the last; there all
                    pixels attend to all
    n_win           regions a side, or (down, across); the authors use 7 for ImageNet, 8 for ADE20K and 16 for COCO
    mlp_ratio       hidden units of an MLP per channel
    img_size        image that the model is meant for, pixels a side or (height, width). Nothing in it depends on that:
                    it runs at any size, as the authors' dense-prediction code does (`auto_pad`). If regions do not
                    divide a normed map, it is padded with zeros at the bottom and right, which are attended
    drop_path_rate  a linear ramp from 0 over all blocks
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    stem_class: type[nn.Module] = Stem
    halve_class: type[nn.Module] = Halve
    routed_class: type[RoutedAttention] = RoutedAttention
    full_class: type[FullAttention] = FullAttention
    positions: bool = True  # whether a block begins with a convolution that gives pixels their positions
    feature_norm_eps = 1e-6

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (2, 4, 8, 8),
        topk: Sequence[int] = (1, 4, 16),
        *,
        n_win: int | tuple[int, int] = 7,
        mlp_ratio: float = 3,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, dims=dims, depths=depths, heads=heads)
        if not isinstance(topk, Sequence) or len(topk) != len(dims) - 1:
            raise ValueError(f"topk is {topk!r}: expected a number for each of {len(dims)} stages but the last")
        kinds = [*(partial(self.routed_class, n_win=n_win, topk=count) for count in topk), self.full_class]
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, count, kind, ramp) in enumerate(zip(dims, heads, kinds, rates, strict=True)):
            blocks = [block(dim, kind(dim, count), mlp_ratio, rate, self.positions) for rate in ramp]
            stages.append(Stage(blocks, downsample=self.halve_class(dims[i - 1], dim) if i else None))
        norm = Nhwc(OrderedDict(norm=nn.BatchNorm2d(dims[-1])))
        super().__init__(
            self.stem_class(in_chans, dims[0]),
            stages,
            Head(dims[-1], num_classes, norm=norm, pool=global_pool, drop_rate=drop_rate),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.init_layers()


class BiFormerSTL(BiFormer):
    """BiFormer in the layout of Swin-T: patches instead of overlapping convolutions, wider MLPs, no positions.

    Arguments as in `BiFormer`; the authors' code for it pads no map. Incomplete patches at the bottom and right are
    dropped.
    """

    stem_class = StlStem
    halve_class = PatchMerge
    positions = False

    @staticmethod
    def min_img_size_for(stages: int) -> int:
        return 2 ** (stages + 1)


class BiFormerSTLNchw(BiFormerSTL):
    """The second published BiFormer-STL, which computes differently; see its two kinds of attention.

    If `n_win` does not divide a map, there are more regions than that a side: see `FloorRoutedAttention`.
    """

    routed_class = FloorRoutedAttention
    full_class = ValueFullAttention

    def init_layers(self) -> None:
        """Only the classifier is published as a linear layer: 1 x 1 convolutions keep torch's initialisation."""
        init_linear(self.head.fc)


def block(dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float, positions: bool) -> nn.Sequential:
    """Figure 4: position, attention, MLP."""
    layers = OrderedDict(pos=ConvPosition(dim)) if positions else OrderedDict()
    layers["attn"] = Residual(nn.LayerNorm(dim, 1e-6), attention, drop_path=drop_path)
    layers["mlp"] = Residual(nn.LayerNorm(dim, 1e-6), Mlp(dim, hidden_units(dim, mlp_ratio)), drop_path=drop_path)
    return nn.Sequential(layers)


register(BiFormer, VARIANTS)
register(BiFormerSTL, {"biformer_stl": STL})
register(BiFormerSTLNchw, {"biformer_stl_nchw": STL})
