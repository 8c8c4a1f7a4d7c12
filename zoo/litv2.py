"""LITv2: Fast Vision Transformers with HiLo Attention, https://arxiv.org/abs/2205.13213

Early stages have no attention. In the third, some heads attend inside small windows, for the high frequencies, and the
others to a pooled map, for the low ones. Maps are halved by deformable convolutions.
"""

from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import register_notrace_function
from torch import Tensor, fx, nn
from torchvision.ops import deform_conv2d

from ops import pooled_attention, unpack, window_attention
from ops.dispatch import autocasts, by_reference, ordered, wide
from ops.onnx_export import for_onnx

from .backbone import Backbone, Head, Stage
from .blocks import (
    Mlp,
    PaddedAttention,
    PatchStem,
    Residual,
    check_heads,
    check_model,
    drop_path_rates,
    number,
    pad_to_multiple,
)
from .registry import register

for op in (pooled_attention, window_attention, unpack, pad_to_multiple):
    fx.wrap(op)
    register_notrace_function(op)

SMALL = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
# Appendix A; a head has 32 channels in all of them
VARIANTS = {
    "litv2_s": {**SMALL, "alpha": 0.9, "img_size": 224},
    "litv2_m": {**SMALL, "depths": (2, 2, 18, 2), "alpha": 0.9, "img_size": 224},
    "litv2_b": {
        "dims": (128, 256, 512, 1024),
        "depths": (2, 2, 18, 2),
        "heads": (4, 8, 16, 32),
        "alpha": 0.9,
        "img_size": 224,
    },
}
# Figure 4: the share of heads for low frequencies, in tenths
ALPHAS = (0, 2, 4, 5, 7, 9, 10)
VARIANTS |= {f"litv2_s_a{tenths:02}": {**SMALL, "alpha": tenths / 10, "img_size": 224} for tenths in ALPHAS}


@fx.wrap
@register_notrace_function
def sample_2x2(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Deformable convolution of 2 x 2 taps and stride 2 on an NCHW map, https://arxiv.org/abs/1703.06211.

    offset   (B, 8, H // 2, W // 2): down and right, in pixels, of the taps (0, 0), (0, 1), (1, 0), (1, 1)
    Computed at least in float32, also under autocast: offsets are fractions of a pixel. Where ops run their reference,
    so does this: with operators that have derivatives of any order, also forward-mode, which neither fast path has.
    These also serve where deterministic algorithms forbid the backward of torchvision's, which uses atomics.
    """
    dtype = wide(weight.dtype)
    x, offset, kernel = x.to(dtype), offset.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if not torch.jit.is_scripting():
        if for_onnx():
            # onnxruntime may have no deformable convolution
            return F.conv2d(resample(x, offset), kernel, bias, (2, 2)).to(weight.dtype)
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return sample_2x2(x, offset, kernel, bias).to(weight.dtype)
        if by_reference() or ordered(x):
            return F.conv2d(interpolate(x, offset, True), kernel, bias, (2, 2)).to(weight.dtype)
    if x.is_cpu:
        # torchvision's op runs on one thread there, and accumulates gradients pixel by pixel
        return F.conv2d(interpolate(x, offset), kernel, bias, (2, 2)).to(weight.dtype)
    return deform_conv2d(x, offset, kernel, bias, (2, 2)).to(weight.dtype)


def moves(offset: Tensor) -> Tensor:
    """(B, 8, h, w) -> (B, 2 * h, 2 * w, 2): down and right, at the place of each tap in an ordinary convolution."""
    return offset.unflatten(1, [2, 2, 2]).permute(0, 4, 1, 5, 2, 3).flatten(3, 4).flatten(1, 2)


def interpolate(x: Tensor, offset: Tensor, plain: bool = False) -> Tensor:
    """What all taps see, as a map for an ordinary convolution, (B, C, H, W) -> (B, C, 2 * (H // 2), 2 * (W // 2)).

    Each tap sees a weighted sum of four pixels, all channels at once; pixels outside the map have weight 0. `plain`
    holds these four in memory, for a sum by operators that have derivatives of any order.
    """
    B, C, H, W = x.shape
    move = moves(offset)
    row = torch.arange(H - H % 2, dtype=x.dtype, device=x.device)[:, None] + move[..., 0]
    column = torch.arange(W - W % 2, dtype=x.dtype, device=x.device) + move[..., 1]
    rows, down = around(row, H)
    columns, right = around(column, W)
    rows = rows + H * torch.arange(B, device=x.device).view(-1, 1, 1, 1)
    pixels = W * rows[..., :, None] + columns[..., None, :]  # (B, 2h, 2w, 2, 2)
    weights = down[..., :, None] * right[..., None, :]
    maps = x.permute(0, 2, 3, 1).reshape(-1, C)
    if plain:
        out = (weights.unsqueeze(-1) * F.embedding(pixels, maps)).sum((3, 4))
    else:
        out = F.embedding_bag(pixels.view(-1, 4), maps, mode="sum", per_sample_weights=weights.view(-1, 4))
    return out.view(B, H - H % 2, W - W % 2, C).permute(0, 3, 1, 2)


def around(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two pixels (..., 2) around a `place` (...) on an axis, and their weights: 0 for those outside."""
    first = place.floor()
    share = place - first
    pixels = torch.stack([first, first + 1], -1)
    weights = torch.stack([1 - share, share], -1).masked_fill((pixels < 0) | (pixels >= size), 0)
    return pixels.long().clamp(0, size - 1), weights  # NaN becomes a pixel of weight NaN


def resample(x: Tensor, offset: Tensor) -> Tensor:
    """The map of `interpolate`, with operators of ONNX."""
    H, W = x.shape[2], x.shape[3]
    move = moves(offset)
    rows = torch.arange(H - H % 2, dtype=x.dtype, device=x.device)[:, None]
    columns = torch.arange(W - W % 2, dtype=x.dtype, device=x.device)
    # pixel p of n is (2 * p + 1) / n - 1 for grid_sample, which takes columns first
    places = [(2 * (columns + move[..., 1]) + 1) / W - 1, (2 * (rows + move[..., 0]) + 1) / H - 1]
    return F.grid_sample(x, torch.stack(places, -1), padding_mode="zeros", align_corners=False)


class DeformableConv(nn.Conv2d):
    """A convolution of 2 x 2 taps and stride 2 whose sampling points are moved by `offset`; see `sample_2x2`."""

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:  # (B, C, H, W), (B, 8, H // 2, W // 2)
        return sample_2x2(x, offset, self.weight, self.bias)


class DeformableMerge(nn.Module):
    """Section 3.3: a deformable convolution that halves the map, without an odd last row or column; norm and GELU."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 8, 2, 2)
        # called as a module, so that hooks run: pruning and weight norm compute the weight in a hook
        self.conv = DeformableConv(dim, dim_out, 2, 2)
        self.norm = nn.BatchNorm2d(dim_out)
        self.act = nn.GELU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets of zero: it starts as a convolution."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H // 2, W // 2, C')
        x = x.permute(0, 3, 1, 2)
        x = self.conv(x, self.offset(x))
        return self.act(self.norm(x)).permute(0, 2, 3, 1)


class HighFrequencies(PaddedAttention):
    """Attention inside windows; tokens attend to the zeros that pad the map to whole windows."""

    def __init__(self, dim: int, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = to_2tuple(window)
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, heads * head_dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, heads * D)
        tokens, outside = self.project(x)
        q, k, v = unpack(tokens.unflatten(-1, [3, self.heads, -1]))  # (B, H, W, heads, D)
        return self.proj(window_attention(q, k, v, None, self.window, outside=outside).flatten(3))


class LowFrequencies(nn.Module):
    """Attention to a map that is average-pooled, `window` to 1 along a side, and padded with zeros to whole windows."""

    def __init__(self, dim: int, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.q = nn.Linear(dim, heads * head_dim)
        self.kv = nn.Linear(dim, 2 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, heads * head_dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, heads * D)
        q = self.q(x).unflatten(-1, [self.heads, -1])  # (B, H, W, heads, D)
        if self.window > 1:
            x = pad_to_multiple(x.permute(0, 3, 1, 2), self.window)
            x = F.avg_pool2d(x, self.window).permute(0, 2, 3, 1)
        k, v = self.kv(x).unflatten(-1, [2, self.heads, -1]).unbind(3)  # (B, h, w, heads, D)
        return self.proj(pooled_attention(q, k, v).flatten(3))


class HiLo(nn.ModuleDict):
    """Figure 2: heads for high frequencies beside heads for low ones, each group with its own projection.

    alpha   the share of heads for low frequencies, rounded down to whole heads; windows of 1 have no high frequencies,
            so all heads are for low ones
    """

    def __init__(self, dim: int, heads: int, alpha: float, window: int) -> None:
        check_heads(dim, heads)
        alpha = number("alpha", alpha, "a share of the heads, from 0 to 1", 0, 1)
        low = heads if window == 1 else int(heads * alpha)
        counts = {"hi": (HighFrequencies, heads - low), "lo": (LowFrequencies, low)}
        super().__init__({k: kind(dim, count, dim // heads, window) for k, (kind, count) in counts.items() if count})

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        parts = []
        for branch in self.values():
            parts.append(branch(x))
        return torch.cat(parts, -1)


class ConvMlp(Mlp):
    """An MLP with a depthwise convolution before the activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


def block(dim: int, heads: int, alpha: float, window: int, drop_path: float) -> nn.Sequential:
    """Attention, if there is a window, then an MLP."""
    branches = OrderedDict()
    if window:
        attention = HiLo(dim, heads, alpha, window)
        branches["attn"] = Residual(nn.LayerNorm(dim), attention, drop_path=drop_path)
    branches["mlp"] = Residual(nn.LayerNorm(dim), ConvMlp(dim, 4 * dim), drop_path=drop_path)
    return nn.Sequential(branches)


class LITv2(Backbone):
    """Input (B, in_chans, H, W), output (B, num_classes).

    dims, depths, heads  channels, blocks and attention heads of each stage
    alpha           share of the heads that attend to low frequencies
    windows         pixels a side of HiLo's windows in each stage; 0: no attention, 1: all heads attend to all pixels
    img_size        image that the model is meant for, pixels a side or (height, width). Nothing in it depends on that:
                    it runs at any size, as the authors' dense-prediction code does. Zeros pad the image to a multiple
                    of 4, and normed maps to whole windows: tokens attend to these zeros. When a map is halved, an odd
                    last row or column is dropped
    drop_path_rate  a linear ramp from 0 over all blocks
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        alpha: float = 0.9,
        windows: Sequence[int] = (0, 0, 2, 1),
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, dims=dims, depths=depths, heads=heads, windows=windows)
        if not all(isinstance(window, Integral) and window >= 0 for window in windows):
            raise ValueError(f"windows is {tuple(windows)}: expected pixels a side of each stage, or 0")
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, count, window, ramp) in enumerate(zip(dims, heads, windows, rates, strict=True)):
            blocks = [block(dim, count, alpha, window, rate) for rate in ramp]
            stages.append(Stage(blocks, downsample=DeformableMerge(dims[i - 1], dim) if i else None))
        super().__init__(
            PatchStem(in_chans, dims[0]),
            stages,
            Head(dims[-1], num_classes, norm=nn.LayerNorm(dims[-1]), pool=global_pool, drop_rate=drop_rate),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.init_layers()

    @staticmethod
    def min_img_size_for(stages: int) -> int:
        return 2 ** (stages + 1) - 3  # patches of 4 are padded, patches of 2 are not

    @torch.jit.ignore
    def lr_scales(self) -> dict[str, float]:
        """Offsets move the sampling points of a whole map: their weights get a hundredth of the learning rate."""
        return {name: 0.01 for name, _ in self.named_parameters() if name.endswith(".offset.weight")}


register(LITv2, VARIANTS)
