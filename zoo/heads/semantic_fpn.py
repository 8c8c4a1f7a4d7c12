"""The semantic branch of Panoptic FPN, https://arxiv.org/abs/1901.02446: levels of a pyramid, upsampled and summed."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .layers import ConvBlock, PixelHead, resize


class SemanticFPN(PixelHead):
    """Maps of a feature pyramid, fine to coarse -> logits (B, num_classes, H, W) at the size of the finest.

    width       channels of the maps
    reductions  pixels of the image per pixel of each map, along a side
    channels    of every map within the head
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        reductions: Sequence[int] = (4, 8, 16, 32),
        channels: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        doublings = [round(math.log2(reduction / reductions[0])) for reduction in reductions]
        self.scales = nn.ModuleList(_scale(width, channels, count) for count in doublings)

    def forward(self, features: Sequence[Tensor]) -> Tensor:  # [(B, width, H, W)] -> (B, num_classes, H, W)
        size = features[0].shape[-2:]
        maps = [resize(scale(x), size) for scale, x in zip(self.scales, features, strict=True)]
        return self.classify(sum(maps[1:], maps[0]))


def _scale(width: int, channels: int, doublings: int) -> nn.Sequential:
    """A convolution before every doubling; a level without doublings has one too."""
    layers: list[nn.Module] = []
    for i in range(max(1, doublings)):
        layers.append(ConvBlock(channels if i else width, channels, 3))
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
