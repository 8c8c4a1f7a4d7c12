"""Convolutional blocks.

The modules inside are torch's own, so that `SyncBatchNorm` conversion, quantisation and counters of operations support
them. They see NCHW *views* of (B, H, W, C) maps, which are channels-last tensors: the permutation on the way in and out
copies nothing.
"""

from collections import OrderedDict

import torch.nn.functional as F
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


class ConvPosition(nn.Module):
    """x + depthwise(x): a 3 x 3 convolution whose zero padding gives tokens their positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
