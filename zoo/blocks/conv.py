"""Convolutional blocks.

The modules inside are torch's own, so that `SyncBatchNorm` conversion, quantisation and counters of operations support
them. They see NCHW *views* of (B, H, W, C) maps, which are channels-last tensors: the permutation on the way in and out
copies nothing.
"""

from collections import OrderedDict

import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite
from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops.sizes import covering, surely


@fx.wrap
@register_notrace_function
def pad_to_multiple(x: Tensor, side: int) -> Tensor:
    """Zeros at the bottom and right of an NCHW map, up to multiples of `side`; one call to torch.fx."""
    H, W = x.shape[2], x.shape[3]
    down, right = covering(H, side) - H, covering(W, side) - W
    return x if surely(down == 0) and surely(right == 0) else F.pad(x, [0, right, 0, down])


class Nhwc(nn.Sequential):
    """A chain of NCHW modules on a (B, H, W, C) map."""

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H', W', C')
        x = x.permute(0, 3, 1, 2)
        for module in self:
            x = module(x)
        return x.permute(0, 2, 3, 1)


class Halve(Nhwc):
    """A 3 x 3 convolution that halves a (B, H, W, C) map, then a batch norm."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(OrderedDict(conv=nn.Conv2d(dim, dim_out, 3, 2, 1), norm=nn.BatchNorm2d(dim_out)))


class Conv2dSame(nn.Conv2d):
    """TensorFlow's padding "same" on an NCHW map: ceil(size / stride) outputs, odd padding at the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        # plain arithmetic on sizes, no branch on them: torch.fx traces this
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        pad_h = ((x.shape[2] + sh - 1) // sh - 1) * sh + kh - x.shape[2]
        pad_w = ((x.shape[3] + sw - 1) // sw - 1) * sw + kw - x.shape[3]
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class ConvPosition(nn.Module):
    """x + depthwise(x): a 3 x 3 convolution whose zero padding gives tokens their positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class AvgPool2dSame(nn.AvgPool2d):
    """TensorFlow's 2 x 2 average pooling: ceil(size / 2) outputs, positions outside the map left out of the mean."""

    def __init__(self) -> None:
        super().__init__(2, 2, ceil_mode=True, count_include_pad=False)


class MBConv(nn.Module):
    """MaxViT's inverted bottleneck: norm, expand, depthwise, squeeze-and-excite, project; residual to the raw input.

    conv      the class of the depthwise convolution, `Conv2dSame` or `nn.Conv2d` (then padded by 1 on each side)
    act       the class of the activation, built without arguments
    shortcut  module for the raw input: pooling and a change of width, if the block has them, or None

    The squeeze is a quarter of the output width. Figure 2 and Appendix A of https://arxiv.org/abs/2204.01697.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        stride: int = 1,
        expand: int = 4,
        conv: type[nn.Conv2d] = Conv2dSame,
        act: type[nn.Module] = nn.GELU,
        shortcut: nn.Module | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        hidden = expand * dim_out
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


class FusedMBConv(nn.Module):
    """GC ViT's x + project(gate(act(depthwise(x)))), without norms, on an NCHW map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False)
        self.act = nn.GELU()
        self.se = SqueezeExcite(dim, rd_channels=dim // 4, act_layer=nn.GELU, bias=False)
        self.project = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return x + self.project(self.se(self.act(self.depthwise(x))))


class FusedReduce(nn.Module):
    """GC ViT's norm, convolutions, norm, on a (B, H, W, C) map; half the size."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv = FusedMBConv(dim)
        self.reduction = nn.Conv2d(dim, dim_out, 3, 2, 1, bias=False)
        self.norm2 = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')
        x = self.conv(self.norm1(x).permute(0, 3, 1, 2))
        return self.norm2(self.reduction(x).permute(0, 2, 3, 1))
