"""What the segmentation heads share. Maps are (B, C, H, W) here, as timm's `features_only` returns them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.dispatch import ordered, wide, without_autocast
from ops.sizes import alike, ceil, varies


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
    """A head that ends in a linear classifier of every pixel, after a dropout of whole channels."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def classify(self, x: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, num_classes, H, W)
        return self.classifier(self.dropout(x))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, C, H, W) -> (B, C, *size)
    return x if alike(x.shape[-2:], size) else F.interpolate(x, size, mode="bilinear", align_corners=False)


def averages(x: Tensor, side: int) -> Tensor:  # (B, C, H, W) -> (B, C, side, side)
    """`F.adaptive_avg_pool2d`; by matmuls with masks where deterministic algorithms forbid its backward, which uses
    atomics, and in a graph for maps of many sizes, which it would specialise to one size.
    """
    if not (ordered(x) or varies(x.shape[2]) or varies(x.shape[3])):
        return F.adaptive_avg_pool2d(x, side)
    return masked_averages(x, side)


def masked_averages(x: Tensor, side: int) -> Tensor:  # (B, C, H, W) -> (B, C, side, side)
    dtype = wide(x.dtype)  # as pooling accumulates; the weights of a mean are no halves
    rows, columns = (_parts(x.shape[dim], side, x.device, dtype) for dim in (2, 3))
    with without_autocast(x):
        return (rows @ x.to(dtype) @ columns.T).to(x.dtype)


def _parts(length: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What places of an axis weigh in the mean of each of `count` parts, (count, length).

    Parts overlap if they do not divide the axis.
    """
    parts, places = (torch.arange(n, device=device) for n in (count, length))
    starts, ends = parts * length // count, ceil((parts + 1) * length, count)
    covered = (places >= starts[:, None]) & (places < ends[:, None])
    return covered.to(dtype) / (ends - starts)[:, None]
