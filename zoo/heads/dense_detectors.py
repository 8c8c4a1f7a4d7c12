"""RetinaNet and FCOS: torchvision's heads and losses, on features computed elsewhere."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead

from .anchors import Anchors, BestMatcher
from .precision import predicts_in_single

Targets = list[dict[str, Tensor]]


class Given(nn.Identity):
    """Takes the place of torchvision's backbone, from which torchvision reads the number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


class WithArea:
    """Mixin for torchvision's dense detectors: boxes without width or height do not count in `detections_per_img`.

    Once clipped, a box in the padding has none. It overlaps with nothing, so it can be left out after NMS.
    """

    def postprocess_detections(self, *args: Any) -> list[dict[str, Tensor]]:
        unlimited = copy(self)  # threads may share this one
        unlimited.detections_per_img = None
        detections = super(WithArea, unlimited).postprocess_detections(*args)
        return [_with_area(found, self.detections_per_img) for found in detections]


class BatchLosses(RetinaNetHead):
    """Losses divided by the batch's positives, at least one per image; torchvision's are means over the images."""

    def compute_loss(
        self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        mean, one = super().compute_loss, [slice(i, i + 1) for i in range(len(targets))]
        losses = [
            mean(targets[i], {key: x[i] for key, x in head_outputs.items()}, anchors[i], matched_idxs[i]) for i in one
        ]
        counts = torch.stack([(matches >= 0).sum().clamp(min=1) for matches in matched_idxs])
        return {key: (torch.stack([loss[key] for loss in losses]) * counts).sum() / counts.sum() for key in losses[0]}


class RetinaNetHeads(WithArea, RetinaNet):
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
        anchors = Anchors(strides, sizes)
        head = BatchLosses(channels, anchors.num_anchors_per_location()[0], num_classes)
        kwargs = {"detections_per_img": 100, "head": head, **kwargs}
        super().__init__(Given(channels), num_classes, anchor_generator=anchors, **kwargs)
        if "proposal_matcher" not in kwargs:
            self.proposal_matcher = BestMatcher(self.proposal_matcher, floor=0)
        del self.transform
        predicts_in_single(self.head)

    def forward(self, images: ImageList, features: list[Tensor], targets: Targets | None = None) -> Any:
        outputs, anchors = self.head(features), self.anchor_generator(images, features)
        if targets is not None:
            return self.compute_loss(targets, outputs, anchors)
        return self.postprocess_detections(*_by_level(outputs, anchors, features), images.image_sizes)


class FCOSHeads(WithArea, FCOS):
    """Maps of an FPN to losses, or to detections (https://arxiv.org/abs/1904.01355); as in torchvision,
    except that boxes without width or height are left out.

    The score threshold is 0.05, as in the published models; torchvision's 0.2 drops what average precision counts.

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
    """Group norm that also takes a single image with one pixel and one channel per group; the result is the shift.

    torch rejects such an image alone, but takes it among others, though images do not affect each other's norm.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> the same
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _with_area(found: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """The first `most` detections whose boxes have a width and a height."""
    boxes = found["boxes"]
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:most, 0]
    return {key: value[kept] for key, value in found.items()}


def _by_level(
    outputs: dict[str, Tensor], anchors: list[Tensor], features: list[Tensor]
) -> tuple[dict[str, list[Tensor]], list[list[Tensor]]]:
    """Outputs (B, anchors, ...) and each image's anchors, cut into the parts that belong to each map."""
    pixels = [x.shape[2] * x.shape[3] for x in features]
    counts = [count * (len(anchors[0]) // sum(pixels)) for count in pixels]
    return {key: list(x.split(counts, 1)) for key, x in outputs.items()}, [list(a.split(counts)) for a in anchors]
