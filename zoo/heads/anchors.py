"""Anchors, their matching with objects, and pooling of regions, as mmdet computes them, in torchvision's classes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ops.dispatch import wide


class Anchors(AnchorGenerator):
    """Anchors whose sides are not rounded, a fixed number of pixels apart.

    torchvision rounds the sides, and spaces anchors by the ratio of the padded image's side to that of the map.

    strides        pixels of the image per pixel of each map
    sizes          sides of the square anchors of each map, in pixels
    aspect_ratios  height by width, of all maps
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))
        self.strides = tuple(strides)
        self.exact = self.cell_anchors

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(ratios * scales, 4) corners around a centre at 0."""
        with torch.device(device):
            roots = torch.tensor(aspect_ratios, dtype=dtype).sqrt()[:, None]
            sides = torch.tensor(scales, dtype=dtype)[None]
            widths, heights = (sides / roots).flatten(), (sides * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each image, (N, 4) boxes of all maps: by map, row, column, ratio, size."""
        like = feature_maps[0]
        # from the exact ones each time: a cast must not persist
        self.cell_anchors = [cell.to(like.device, wide(like.dtype)) for cell in self.exact]
        strides = [[stride] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([x.shape[2:] for x in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class BestMatcher(Matcher):
    """Assigns an object to its best anchors even where they overlap with it by less than the threshold.

    torchvision has no floor for that, and assigns such an anchor to another object that it overlaps with more.

    matcher  its thresholds are kept
    floor    IoU that an object's best anchor must have; it must overlap in any case
    """

    def __init__(self, matcher: Matcher, floor: float) -> None:
        super().__init__(matcher.high_threshold, matcher.low_threshold, allow_low_quality_matches=True)
        self.floor = floor

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Write to `matches` (N) from the IoUs (M, N) of objects and anchors; the last of several objects wins."""
        best = match_quality_matrix.amax(1, keepdim=True)
        best = best.where((best >= self.floor) & (best > 0), math.inf)  # no anchor has that
        objects, anchors = (match_quality_matrix == best).nonzero(as_tuple=True)
        # the largest index: writes to one place have no order on a GPU
        last = torch.full_like(matches, -1).scatter_reduce_(0, anchors, objects, "amax")
        matches.copy_(torch.where(last >= 0, last, matches))


class AlignedPooler(MultiScaleRoIAlign):
    """RoIAlign that samples at the centres of pixels, as many times as a region has pixels.

    torchvision's pooler is off by half a pixel, which no argument changes, and takes two samples per bin.

    strides  pixels of the image per pixel of each map; the finest serves regions of up to 56 * 2 pixels a side
    """

    def __init__(self, strides: Sequence[int], output_size: int) -> None:
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(regions of all images, C, output_size, output_size)."""
        maps = [x[name] for name in self.featmap_names]
        images = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], 1)
        sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).sqrt()
        levels = torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, len(maps) - 1)
        out = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = torch.where(levels == level)[0]
            exact = wide(feature.dtype)
            places = regions[here].to(exact)
            pooled = roi_align(feature.to(exact), places, self.output_size, 1 / stride, 0, aligned=True)
            out[here] = pooled.to(out.dtype)
        return out
