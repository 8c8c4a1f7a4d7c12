"""Queries that the whole image shares."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops.sizes import surely

from .conv import FusedMBConv


@fx.wrap
@register_notrace_function
def fit(x: Tensor, window: tuple[int, int]) -> Tensor:
    """An NCHW map of queries as one window: interpolated if it is not, as in the published detection code."""
    is_one = surely(x.shape[2] == window[0]) and surely(x.shape[3] == window[1])
    return x if is_one else F.interpolate(x, [window[0], window[1]], mode="bicubic", align_corners=False)


class QueryGenerator(nn.Module):
    """GC ViT's figure 3: one window of queries for all global blocks of a stage, from its map, by `steps` convolutions.

    A head has 32 channels.
    """

    def __init__(self, dim: int, window: tuple[int, int], steps: int) -> None:
        super().__init__()
        self.heads = dim // 32
        self.convs = nn.ModuleList(FusedMBConv(dim) for _ in range(steps))
        self.set_window(window, False)

    @torch.jit.ignore
    def set_window(self, window: tuple[int, int], pool: bool) -> None:
        """Set the size of a window, and whether every step halves the map."""
        self.window = window
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, wh, ww, heads, D)
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs:
            x = self.pool(conv(x))
        return fit(x, self.window).permute(0, 2, 3, 1).unflatten(-1, [self.heads, -1])
