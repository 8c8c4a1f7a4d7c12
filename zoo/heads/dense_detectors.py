"""RetinaNet and FCOS: torchvision's heads and losses, on features that are there already."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList

from .anchors import Anchors
from .precision import predicts_in_single

Targets = list[dict[str, Tensor]]


class Given(nn.Identity):
    """Stands where torchvision wants a backbone, of which it reads the number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


class RetinaNetHeads(RetinaNet):
    """Maps of an FPN to losses, or to detections (https://arxiv.org/abs/1708.02002).

    channels     of each map
    strides      pixels of the image per pixel of each map
    anchor_size  side of the smallest anchor in pixels of its map; there are three, a third of an octave apart
    kwargs       of `torchvision.models.detection.RetinaNet`
    """

    def __init__(
        self, channels: int, num_classes: int, strides: list[int], anchor_size: float = 4, **kwargs: Any
    ) -> None:
        sizes = [[anchor_size * stride * 2 ** (i / 3) for i in range(3)] for stride in strides]
        kwargs = {"detections_per_img": 100, **kwargs}
        super().__init__(Given(channels), num_classes, anchor_generator=Anchors(strides, sizes), **kwargs)
        del self.transform
        predicts_in_single(self.head)

    def forward(self, images: ImageList, features: list[Tensor], targets: Targets | None = None) -> Any:
        outputs, anchors = self.head(features), self.anchor_generator(images, features)
        if targets is not None:
            return self.compute_loss(targets, outputs, anchors)
        return self.postprocess_detections(*_by_level(outputs, anchors, features), images.image_sizes)


class FCOSHeads(FCOS):
    """Maps of an FPN to losses, or to detections (https://arxiv.org/abs/1904.01355); as in torchvision.

    Scores count from 0.05 on, as for the published models; torchvision's 0.2 leaves out what average precision counts.

    channels  of each map
    strides   pixels of the image per pixel of each map
    kwargs    of `torchvision.models.detection.FCOS`
    """

    def __init__(self, channels: int, num_classes: int, strides: list[int], **kwargs: Any) -> None:
        points = Anchors(strides, [[stride] for stride in strides], [1.0])
        kwargs = {"score_thresh": 0.05, **kwargs}
        super().__init__(Given(channels), num_classes, anchor_generator=points, **kwargs)
        del self.transform
        for part in (self.head.classification_head, self.head.regression_head):
            for place, layer in enumerate(part.conv):
                if isinstance(layer, nn.GroupNorm):
                    part.conv[place] = AnyGroupNorm(layer.num_groups, layer.num_channels)
        predicts_in_single(self.head)

    def forward(self, images: ImageList, features: list[Tensor], targets: Targets | None = None) -> Any:
        outputs, anchors = self.head(features), self.anchor_generator(images, features)
        if targets is not None:
            return self.compute_loss(targets, outputs, anchors, [x.shape[2] * x.shape[3] for x in features])
        return self.postprocess_detections(*_by_level(outputs, anchors, features), images.image_sizes)


class AnyGroupNorm(nn.GroupNorm):
    """Group norm that also takes one image with one pixel and one channel a group, which it takes to the shift.

    torch refuses that image alone, but takes it among others, though none has a part in another's norm.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> the same
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _by_level(
    outputs: dict[str, Tensor], anchors: list[Tensor], features: list[Tensor]
) -> tuple[dict[str, list[Tensor]], list[list[Tensor]]]:
    """Outputs (B, anchors, ...) and each image's anchors, cut into the parts that belong to each map."""
    pixels = [x.shape[2] * x.shape[3] for x in features]
    counts = [count * (len(anchors[0]) // sum(pixels)) for count in pixels]
    return {key: list(x.split(counts, 1)) for key, x in outputs.items()}, [list(a.split(counts)) for a in anchors]
