"""Stems, from an NCHW image to a (B, H, W, C) map, and positions of its tokens."""

import math

import torch
from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops.dispatch import wide
from ops.sizes import ceil, varies

from .conv import pad_to_multiple
from .resize import bicubic

fx.wrap(pad_to_multiple)  # in every module that calls it: that is where torch.fx looks


def map_sides(img_size: tuple[int, int], reduction: int) -> tuple[int, int]:
    """(height, width) of the map of an image, with one pixel for `reduction` of the image along a side, rounded up."""
    return ceil(img_size[0], reduction), ceil(img_size[1], reduction)


class ChainStem(nn.Sequential):
    """A chain of NCHW modules on an image."""

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, H', W', C)
        for module in self:
            x = module(x)
        return x.permute(0, 2, 3, 1)


class PatchStem(nn.Module):
    """A convolution over patches, then a norm; zeros pad the image to whole patches at the bottom and right.

    kernel  side of the convolution, odd, which is then centred on the first pixel of each patch; None: the patch
    """

    def __init__(self, in_chans: int, dim: int, patch: int = 4, kernel: int | None = None) -> None:
        super().__init__()
        self.patch = patch
        self.conv1 = nn.Conv2d(in_chans, dim, kernel or patch, patch, kernel // 2 if kernel else 0)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ceil(H / patch), ceil(W / patch), dim)
        return self.norm(self.conv1(pad_to_multiple(x, self.patch)).permute(0, 2, 3, 1))


def resize_positions(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A table of positions (1, h * w, C), interpolated from its grid h x w to another, bicubic, half-pixel centres."""
    x = table.to(wide(table.dtype)).unflatten(1, [grid[0], grid[1]]).permute(0, 3, 1, 2)
    x = bicubic(x, (size[0], size[1]))
    return x.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


@fx.wrap
@register_notrace_function
def add_positions(x: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, W, C) plus the table, in order if it has one entry per token, else resized; one call for torch.fx."""
    H, W = x.shape[1], x.shape[2]
    if varies(H * W):
        entries = torch.arange(H * W, device=x.device)
        ordered = table[:, entries.clamp(max=table.shape[1] - 1)]
        table = torch.where(entries[-1] == table.shape[1] - 1, ordered, resize_positions(table, grid, (H, W)))
    elif table.shape[1] != H * W:
        table = resize_positions(table, grid, (H, W))
    return x + table.unflatten(1, [H, W])


class PositionTable(nn.Module):
    """x + table: a learned vector for each position of a map.

    It starts as sines and cosines of the column in the first half of the channels, and of the row in the second. `grid`
    is the map that it is made for, (rows, columns). A map with as many tokens reads it in row-major order, whatever its
    sides; for any other map it is interpolated. Raises ValueError unless `dim` is a multiple of 4.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim is {dim}: expected a multiple of 4, for sines and cosines of rows and columns")
        self.grid = grid
        self.table = nn.Parameter(sines(dim, grid))

    def reset_parameters(self) -> None:
        """Make the table sines and cosines again; it may be sharded."""
        values = sines(self.table.shape[2], self.grid).to(self.table.device)
        if hasattr(self.table, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor  # imports much

            values = distribute_tensor(values, self.table.device_mesh, self.table.placements)
        with torch.no_grad():
            self.table.copy_(values)

    @torch.jit.ignore
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Change the grid; the table is interpolated, and is then a new parameter."""
        if tuple(grid) == tuple(self.grid):
            return
        table = resize_positions(self.table.detach(), self.grid, grid)
        self.grid, self.table = grid, nn.Parameter(table, self.table.requires_grad)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return add_positions(x, self.table, self.grid)


def sines(dim: int, grid: tuple[int, int]) -> Tensor:
    """(1, rows * columns, dim): sin and cos of column and row, a quarter each, of frequencies 1 to 1 / 10000."""
    rates = torch.exp(-math.log(10000) * torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = (torch.arange(n, dtype=torch.float64)[:, None] * rates for n in grid)  # (n, dim / 4)
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, grid[1], -1)
    column = torch.cat([column.sin(), column.cos()], 1).expand(grid[0], -1, -1)
    return torch.cat([column, row], 2).flatten(0, 1)[None].to(torch.get_default_dtype())
