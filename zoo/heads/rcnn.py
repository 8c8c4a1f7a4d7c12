"""Faster and Mask R-CNN: torchvision's heads and losses, on features that are there already."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.image_list import ImageList

from .anchors import AlignedPooler, Anchors
from .dense_detectors import Given, Targets
from .precision import predicts_in_single


class TwoStage(nn.Module):
    """Regions that a network proposes, then heads on each (https://arxiv.org/abs/1506.01497).

    Maps of an FPN to losses, or to detections. Labels are counted from 1, background being 0.
    """

    def __init__(self, rpn: nn.Module, roi_heads: nn.Module) -> None:
        super().__init__()
        self.rpn = rpn
        self.roi_heads = roi_heads

    def forward(self, images: ImageList, features: list[Tensor], targets: Targets | None = None) -> Any:
        maps = OrderedDict((str(i), x) for i, x in enumerate(features))
        proposals, losses = self.rpn(images, maps, targets)
        detections, more = self.roi_heads(maps, proposals, images.image_sizes, targets)
        return detections if targets is None else {**losses, **more}


def rcnn_heads(
    channels: int, num_classes: int, strides: list[int], *, masks: bool, anchor_size: float = 8, **kwargs: Any
) -> TwoStage:
    """Heads of Mask R-CNN (https://arxiv.org/abs/1703.06870), or of Faster R-CNN without `masks`.

    channels     of each map
    num_classes  without the background
    strides      pixels of the image per pixel of each map; regions are pooled from all but the last
    anchor_size  side of an anchor in pixels of its map
    kwargs       of `torchvision.models.detection.MaskRCNN`
    """
    anchors = Anchors(strides, [[anchor_size * stride] for stride in strides])
    pools: dict[str, Any] = {"box_roi_pool": AlignedPooler(strides[:-1], 7)}
    if masks:
        pools["mask_roi_pool"] = AlignedPooler(strides[:-1], 14)
    kind = MaskRCNN if masks else FasterRCNN
    model = kind(Given(channels), num_classes + 1, rpn_anchor_generator=anchors, **{**pools, **kwargs})
    predicts_in_single(model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor)
    return TwoStage(model.rpn, model.roi_heads)
