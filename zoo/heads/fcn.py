"""A fully convolutional head on one map, https://arxiv.org/abs/1411.4038; also the auxiliary head of the others."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import ConvBlock, PixelHead


class FCN(PixelHead):
    """Maps of a backbone -> logits (B, num_classes, H, W) of one of them, at its size.

    dim     channels of that map; `level` is its index, negative from the coarsest
    depth   3 x 3 convolutions
    concat  concatenate their output with the map itself, followed by another convolution
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        level: int = -1,
        channels: int = 512,
        depth: int = 2,
        concat: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.level = level
        self.convs = nn.Sequential(*(ConvBlock(channels if i else dim, channels, 3) for i in range(depth)))
        self.concat = ConvBlock(dim + channels, channels, 3) if concat else None

    def forward(self, features: Sequence[Tensor]) -> Tensor:  # [(B, C, H, W)] -> (B, num_classes, h, w)
        x = self.convs(features[self.level])
        if self.concat is not None:
            x = self.concat(torch.cat([features[self.level], x], 1))
        return self.classify(x)
