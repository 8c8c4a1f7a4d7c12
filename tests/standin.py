"""The interface of zoo.heads over timm's smallest model: what the tasks are tested with, in seconds."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict

import timm
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork


class Segmenter(nn.Module):
    """One convolution over the sum of the last three maps."""

    def __init__(self, backbone: str, num_classes: int, *, channels: int | None, ignore_index: int, **options):
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(-3, -2, -1), **options)
        width = channels or 32
        self.lateral = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in self.backbone.feature_info.channels())
        self.classify, self.ignore = nn.Conv2d(width, num_classes, 3, padding=1), ignore_index

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral, self.backbone(images), strict=True)]
        size = maps[0].shape[-2:]
        total = sum(F.interpolate(x, size, mode="bilinear") for x in maps)
        logits = F.interpolate(self.classify(total.relu()), images.shape[-2:], mode="bilinear")
        return logits if targets is None else {"decode": F.cross_entropy(logits, targets, ignore_index=self.ignore)}


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


def segmenter(backbone, num_classes, *, head, auxiliary, dropout, **options) -> Segmenter:
    if head not in ("upernet", "semantic_fpn", "fcn"):
        raise ValueError(f"unknown head {head!r}")
    return Segmenter(backbone, num_classes, **options)


def detector(backbone, num_classes, **options) -> Detector:
    return Detector(backbone, num_classes, **options)


def patch(monkeypatch) -> None:
    """Let `zoo.heads` be this module as long as the test lasts."""
    inference = types.SimpleNamespace(whole=lambda model, images: model(images))
    here = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "zoo.heads", here)
    monkeypatch.setattr(here, "inference", inference, raising=False)
