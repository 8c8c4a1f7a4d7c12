"""A pyramid for backbones that have none: ViT and the isotropic models return all their maps at one stride."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ops.sizes import surely


class PlainPyramid(nn.Module):
    """Maps of one stride -> as many maps, each of half the stride of the next; the last but one keeps its own.

    As in BEiT for segmentation (https://arxiv.org/abs/2106.08254): transposed convolutions enlarge maps, max pooling
    shrinks them.

    dims  channels of the maps, shallowest first, three or more; they do not change
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        doublings = range(len(dims) - 2, -2, -1)
        self.scales = nn.ModuleList(_scale(dim, count) for dim, count in zip(dims, doublings, strict=True))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:  # [(B, C, h, w)] -> [(B, C, 2^n h, 2^n w)]
        return [scale(x) for scale, x in zip(self.scales, features, strict=True)]


class Halves(nn.MaxPool2d):
    """Max pooling to half the size, rounded down, but to no less than one pixel."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h / 2, w / 2)
        down, right = (int(surely(side == 1)) for side in x.shape[-2:])
        if down or right:
            x = F.pad(x, (0, right, 0, down), value=float("-inf"))
        return super().forward(x)


def pyramid_of(dims: Sequence[int], reductions: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """A module that makes a pyramid of a backbone's maps (the identity if they are one, or too few), and its strides.

    Raises ValueError if the finest map would not have a whole number as its stride.
    """
    levels = len(reductions)
    if levels < 3 or len(set(reductions)) > 1:
        return nn.Identity(), list(reductions)
    finer = 2 ** (levels - 2)
    if reductions[0] % finer:
        raise ValueError(
            f"maps at a stride of {reductions[0]} cannot make a pyramid of {levels}: expected a multiple of {finer}"
        )
    return PlainPyramid(dims), [reductions[0] * 2**i // finer for i in range(levels)]


def _scale(dim: int, doublings: int) -> nn.Module:
    if doublings < 0:
        return Halves()
    layers: list[nn.Module] = []
    for i in range(doublings):
        layers += [nn.BatchNorm2d(dim), nn.GELU()] if i else []
        layers.append(nn.ConvTranspose2d(dim, dim, 2, 2))
    return nn.Sequential(*layers)
