"""What the segmentation heads share. Maps are (B, C, H, W) here, as timm's `features_only` gives them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, dim: int, dim_out: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        return F.relu(self.norm(self.conv(x)))


class PixelHead(nn.Module):
    """A head that ends in a linear classifier of every pixel, with whole channels dropped before it."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def classify(self, x: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, num_classes, H, W)
        return self.classifier(self.dropout(x))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, C, H, W) -> (B, C, *size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def averages(x: Tensor, side: int) -> Tensor:  # (B, C, H, W) -> (B, C, side, side)
    """`F.adaptive_avg_pool2d`, whose backward on a GPU is by atomics: the same by parts where these may not be."""
    if x.is_cpu or not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(x, side)
    return _means(_means(x, side, 2), side, 3)


def _means(x: Tensor, count: int, dim: int) -> Tensor:
    """Means over `count` parts of an axis, which overlap by a place where it does not divide."""
    length = x.shape[dim]
    parts = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
    return torch.cat([x.narrow(dim, start, end - start).mean(dim, keepdim=True) for start, end in parts], dim)
