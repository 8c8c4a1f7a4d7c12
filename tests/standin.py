"""A detector of the interface of zoo.heads, from torchvision's parts: what the task is tested with, in seconds."""

from __future__ import annotations

from collections import OrderedDict

import timm
from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork


class Pyramid(nn.Module):
    def __init__(self, backbone: str, **options):
        super().__init__()
        self.body = timm.create_model(backbone, features_only=True, out_indices=(-3, -2, -1), **options)
        self.fpn, self.out_channels = FeaturePyramidNetwork(self.body.feature_info.channels(), 32), 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.body(images))))


class Detector(nn.Module):
    """torchvision's FCOS or Mask R-CNN; labels are 0-based here."""

    def __init__(self, backbone: str, num_classes: int, *, head: str, **options):
        super().__init__()
        same = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "_skip_resize": True}
        pyramid, self.first = Pyramid(backbone, **options), int(head == "mask_rcnn")
        if self.first:
            anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
            self.model = MaskRCNN(pyramid, num_classes + 1, rpn_anchor_generator=anchors, **same)
        else:
            anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
            self.model = FCOS(pyramid, num_classes, anchor_generator=anchors, **same)

    def forward(self, images: list[Tensor], targets: list[dict] | None = None):
        if targets is not None:
            return self.model(images, [{**one, "labels": one["labels"] + self.first} for one in targets])
        return [{**found, "labels": found["labels"] - self.first} for found in self.model(images)]


def detector(backbone, num_classes, **options) -> Detector:
    return Detector(backbone, num_classes, **options)
