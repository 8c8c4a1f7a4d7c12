"""UPerNet, https://arxiv.org/abs/1807.10221: the coarsest map pooled, a feature pyramid, all levels fused."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import ConvBlock, PixelHead, averages, resize

POOL_SIZES = (1, 2, 3, 6)  # sides of the grids that the coarsest map is averaged to


class UPerNet(PixelHead):
    """Maps of a backbone, fine to coarse -> logits (B, num_classes, H, W) at the size of the finest.

    dims      channels of the maps
    channels  of every map within the head
    """

    def __init__(self, dims: Sequence[int], num_classes: int, *, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__(channels, num_classes, dropout)
        *finer, last = dims
        self.pools = nn.ModuleList(ConvBlock(last, channels, 1) for _ in POOL_SIZES)
        self.bottleneck = ConvBlock(last + len(POOL_SIZES) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvBlock(dim, channels, 1) for dim in finer)
        self.outputs = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in finer)
        self.fuse = ConvBlock(len(dims) * channels, channels, 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:  # [(B, C, H, W)] -> (B, num_classes, H, W)
        *finer, last = features
        maps = [lateral(x) for lateral, x in zip(self.laterals, finer, strict=True)]
        maps.append(self.pooled(last))
        for i in reversed(range(len(finer))):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[-2:])
        maps = [output(x) for output, x in zip(self.outputs, maps[:-1], strict=True)] + maps[-1:]
        maps = [resize(x, maps[0].shape[-2:]) for x in maps]
        return self.classify(self.fuse(torch.cat(maps, 1)))

    def pooled(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, channels, H, W)
        """The coarsest map beside its averages over grids of several sizes."""
        context = [pool(averages(x, size)) for pool, size in zip(self.pools, POOL_SIZES, strict=True)]
        return self.bottleneck(torch.cat([x, *(resize(y, x.shape[-2:]) for y in context)], 1))
