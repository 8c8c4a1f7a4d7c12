"""MaxViT: Multi-Axis Vision Transformer, https://arxiv.org/abs/2204.01697

A block sees near and far at linear cost: an inverted bottleneck, then attention inside P x P tiles (block), then
attention between P x P tokens spaced evenly over the whole map (grid), each followed by an MLP.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from .backbone import Backbone, Head, Stage
from .blocks import (
    GELUTanh,
    Mlp,
    Residual,
    WindowAttention,
    check_count,
    check_model,
    drop_path_rates,
    image_sides,
    init_fan_out,
    map_sides,
    number,
    plain,
    window_sides,
    windows_of,
)
from .registry import register

Size = int | tuple[int, int]

TABLE = re.compile(r"stages\.\d+\.blocks\.\d+\.(\w+)\.fn\.rpb")
RATIO = 32  # pixels of the image per token of a window, along a side

# Table 1 and Appendix A.1; a head has 32 channels in all of them
SIZES = {
    #            channels of the stem, of each stage             blocks of each stage
    "maxvit_t":  {"stem_dim": 64,  "dims": (64, 128, 256, 512),   "depths": (2, 2, 5, 2)},
    "maxvit_s":  {"stem_dim": 64,  "dims": (96, 192, 384, 768),   "depths": (2, 2, 5, 2)},
    "maxvit_b":  {"stem_dim": 64,  "dims": (96, 192, 384, 768),   "depths": (2, 6, 14, 2)},
    "maxvit_l":  {"stem_dim": 128, "dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2)},
    "maxvit_xl": {"stem_dim": 192, "dims": (192, 384, 768, 1536), "depths": (2, 6, 14, 2)},
}  # fmt: skip
VARIANTS = {
    name if pixels == 224 else f"{name}_{pixels}": {**size, "img_size": pixels}
    for name, size in SIZES.items()
    for pixels in (224, 384, 512)
}
TORCHVISION_VARIANTS = {"maxvit_t_tv": VARIANTS["maxvit_t"]}


class Conv2dSame(nn.Conv2d):
    """TensorFlow's padding "same" on an NCHW map: ceil(size / stride) outputs, odd padding at the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        # plain arithmetic on sizes, no branch on them: torch.fx traces this
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        pad_h = ((x.shape[2] + sh - 1) // sh - 1) * sh + kh - x.shape[2]
        pad_w = ((x.shape[3] + sw - 1) // sw - 1) * sw + kw - x.shape[3]
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class AvgPool2dSame(nn.AvgPool2d):
    """TensorFlow's 2 x 2 average pooling: ceil(size / 2) outputs, positions outside the map left out of the mean."""

    def __init__(self) -> None:
        super().__init__(2, 2, ceil_mode=True, count_include_pad=False)


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions, the first of stride 2; a batch norm and an activation between them, nothing after."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        conv: type[nn.Conv2d] = nn.Conv2d,
        act: type[nn.Module] = nn.GELU,
        bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        padding = 0 if conv is Conv2dSame else 1
        self.conv1 = conv(in_chans, dim, 3, 2, padding, bias=bias)
        self.norm1 = nn.BatchNorm2d(dim, eps)
        self.act = act()
        self.conv2 = conv(dim, dim, 3, 1, padding)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ceil(H / 2), ceil(W / 2), dim)
        return self.conv2(self.act(self.norm1(self.conv1(x)))).permute(0, 2, 3, 1)


class MBConv(nn.Module):
    """The inverted bottleneck: norm, expand, depthwise, squeeze-and-excite, project; residual to the raw input.

    conv      the class of the depthwise convolution, `Conv2dSame` or `nn.Conv2d` (then padded by 1 on each side)
    act       the class of the activation, built without arguments
    shortcut  module for the raw input: pooling and a change of width, if the block has them, or None

    The squeeze is a quarter of the output width. Figure 2 and Appendix A.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        stride: int = 1,
        conv: type[nn.Conv2d] = Conv2dSame,
        act: type[nn.Module] = nn.GELU,
        shortcut: nn.Module | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        hidden = 4 * dim_out
        padding = 0 if conv is Conv2dSame else 1
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.norm = nn.BatchNorm2d(dim, eps)
        self.expand = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden, eps)
        self.depthwise = conv(hidden, hidden, 3, stride, padding, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden, eps)
        self.act = act()
        self.se = SqueezeExcite(hidden, rd_channels=dim_out // 4, act_layer=nn.SiLU)
        self.project = nn.Conv2d(hidden, dim_out, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C')
        x = x.permute(0, 3, 1, 2)
        shortcut = self.shortcut(x)
        x = self.act(self.norm1(self.expand(self.norm(x))))
        x = self.act(self.norm2(self.depthwise(x)))
        x = shortcut + self.drop_path(self.project(self.se(x)))
        return x.permute(0, 2, 3, 1)


class MaxViTBlock(nn.Module):
    """Figure 2: MBConv, block attention, MLP, grid attention, MLP."""

    def __init__(
        self,
        conv: MBConv,
        block: WindowAttention,
        grid: WindowAttention,
        dim: int,
        act: type[nn.Module],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.block_attn = Residual(nn.LayerNorm(dim), block, drop_path=drop_path)
        self.block_mlp = Residual(nn.LayerNorm(dim), Mlp(dim, 4 * dim, act), drop_path=drop_path)
        self.grid_attn = Residual(nn.LayerNorm(dim), grid, drop_path=drop_path)
        self.grid_mlp = Residual(nn.LayerNorm(dim), Mlp(dim, 4 * dim, act), drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C')
        x = self.block_mlp(self.block_attn(self.conv(x)))
        return self.grid_mlp(self.grid_attn(x))


class MaxViT(Backbone):
    """MaxViT with its authors' arithmetic: TensorFlow's padding, tanh GELU.

    Input (B, in_chans, H, W), output (B, num_classes).

    stem_dim, dims, depths  channels of the stem; channels and blocks of each stage
    img_size        image that the windows are made for, pixels a side or (height, width): a window has
                    ceil(img_size / 32) tokens a side, so that the fourth stage is one window. A built model runs at any
                    size of at least 32 pixels with the windows it has: those that reach over the border are padded with
                    positions that are not attended
    window_size, grid_size  tokens a side, or (vertical, horizontal), of the windows of block and of grid attention;
                    None: from `img_size`
    partition_ratio  pixels of the image per token of a window that is made for it, along a side
    drop_path_rate  the authors' ramp: block b of N drops its branches with probability drop_path_rate * b / N
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`
    bn_momentum     share of a batch in the running statistics of the batch norms: 0.1, as in timm. The authors and
                    torchvision use 0.01, which takes some hundred steps from scratch until evaluation matches training

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    no_decay = ("rpb",)
    conv: type[nn.Conv2d] = Conv2dSame
    act: type[nn.Module] = GELUTanh
    norm_eps = 1e-3  # of the batch norms
    stem_bias = head_bias = True
    ramp_reaches_rate = False

    def __init__(
        self,
        stem_dim: int = 64,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        *,
        img_size: Size = 224,
        window_size: Size | None = None,
        grid_size: Size | None = None,
        partition_ratio: int = RATIO,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
        bn_momentum: float = 0.1,
    ) -> None:
        check_model(in_chans, num_classes, dims=dims, depths=depths)
        check_count("stem_dim", stem_dim, "channels of the stem")
        momentum = number("bn_momentum", bn_momentum, "a share of the running statistics, from 0 to 1", 0, 1)
        windows = windows_for(image_sides(img_size), window_size, grid_size, partition_ratio)
        rates = drop_path_rates(drop_path_rate, depths, reached=self.ramp_reaches_rate)
        stages = []
        for before, dim, stage_rates in zip((stem_dim, *dims[:-1]), dims, rates, strict=True):
            opens = [self.block(before, dim, 2, windows, stage_rates[0])]
            stages.append(Stage(opens + [self.block(dim, dim, 1, windows, rate) for rate in stage_rates[1:]]))
        super().__init__(
            ConvStem(in_chans, stem_dim, conv=self.conv, act=self.act, bias=self.stem_bias, eps=self.norm_eps),
            stages,
            Head(
                dims[-1],
                num_classes,
                after=norm_tanh(dims[-1]),
                pool=global_pool,
                drop_rate=drop_rate,
                bias=self.head_bias,
            ),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.partition_ratio = partition_ratio
        self.init_layers()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    def init_layers(self) -> None:
        self.apply(init_fan_out)

    def block(
        self, dim: int, dim_out: int, stride: int, windows: dict[str, tuple[int, int]], drop_path: float
    ) -> MaxViTBlock:
        shortcut = self.shortcut(dim, dim_out) if stride == 2 else None
        conv = MBConv(
            dim,
            dim_out,
            stride=stride,
            conv=self.conv,
            act=self.act,
            shortcut=shortcut,
            drop_path=drop_path,
            eps=self.norm_eps,
        )
        block, grid = (
            # the authors resize tables bilinearly
            WindowAttention(
                dim_out, dim_out // 32, window, partition=kind, scale=self.scale(dim_out), resize="bilinear"
            )
            for kind, window in windows.items()
        )
        return MaxViTBlock(conv, block, grid, dim_out, self.act, drop_path)

    def shortcut(self, dim: int, dim_out: int) -> nn.Module:
        """The shortcut of a strided block: pooling, and a convolution only if the width changes."""
        pool = AvgPool2dSame()
        if dim == dim_out:
            return pool
        return nn.Sequential(OrderedDict(pool=pool, expand=nn.Conv2d(dim, dim_out, 1)))

    def scale(self, dim: int) -> float | None:
        """The factor on the logits; None: from the channels of a head."""
        return None

    @staticmethod
    def args_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The windows, as tables of relative positions show them.

        Windows that are the same for both kinds of attention are returned as the `img_size` that they fit at the usual
        `partition_ratio`: no weight tells another ratio.
        """
        found = ((TABLE.fullmatch(key), tuple(shape[1:])) for key, shape in shapes.items())
        tables = {(match[1], sides) for match, sides in found if match}
        kinds, sides = [kind for kind, _ in sorted(tables)], [sides for _, sides in sorted(tables)]
        windows = windows_of(sides)
        if kinds != ["block_attn", "grid_attn"] or windows is None:
            return {}
        block, grid = windows
        if block == grid:
            return {"img_size": plain([RATIO * side for side in block])}
        return {"window_size": plain(block), "grid_size": plain(grid)}

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: Size | None = None,
        window_size: Size | None = None,
        grid_size: Size | None = None,
        partition_ratio: int | None = None,
    ) -> None:
        """Change the windows for another image size, or as given (see the class); the tables are interpolated.

        A size and a ratio that are not given stay as they are. Windows that are not given are those for the image, also
        if the model was built with others. Raises ValueError, and changes nothing, for sizes that there are not.
        """
        img_size = self.img_size if img_size is None else image_sides(img_size)
        ratio = self.partition_ratio if partition_ratio is None else partition_ratio
        windows = windows_for(img_size, window_size, grid_size, ratio)
        self.img_size, self.partition_ratio = img_size, ratio
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.set_window(windows[module.partition])
        update_model_input_size(self, img_size)
        update_model_args(self, window_size=window_size, grid_size=grid_size, partition_ratio=ratio)


class TorchvisionMaxViT(MaxViT):
    """MaxViT as torchvision computes it, for its own trained weights.

    Differences: symmetric padding, exact GELU, a 3 x 3 shortcut pooling that counts the padding, a shortcut convolution
    in every strided block, logits scaled by the full width, no bias in the first convolution and the classifier, a ramp
    of drop-path rates that ends at the rate.
    """

    conv = nn.Conv2d
    act = nn.GELU
    stem_bias = head_bias = False
    ramp_reaches_rate = True

    def shortcut(self, dim: int, dim_out: int) -> nn.Module:
        return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(3, 2, 1), expand=nn.Conv2d(dim, dim_out, 1)))

    def scale(self, dim: int) -> float:
        return dim**-0.5


def windows_for(
    img_size: tuple[int, int], window_size: Size | None, grid_size: Size | None, ratio: int
) -> dict[str, tuple[int, int]]:
    """The windows of each kind of attention."""
    check_count("partition_ratio", ratio, "pixels per token of a window")
    own = map_sides(img_size, ratio)
    given = {"block": window_size, "grid": grid_size}
    return {kind: window_sides(own if size is None else size) for kind, size in given.items()}


def norm_tanh(dim: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(norm=nn.LayerNorm(dim), fc=nn.Linear(dim, dim), act=nn.Tanh()))


register(MaxViT, VARIANTS)
register(TorchvisionMaxViT, TORCHVISION_VARIANTS)
