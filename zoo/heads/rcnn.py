"""Faster and Mask R-CNN: torchvision's heads, on features computed elsewhere, with mmdet's losses."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import roi_align

from .anchors import AlignedPooler, Anchors, BestMatcher
from .dense_detectors import Given, Targets
from .precision import predicts_in_single


class TwoStage(nn.Module):
    """A region proposal network, then heads on each region (https://arxiv.org/abs/1506.01497).

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


class Made:
    """Takes over the parts and options of a module that torchvision has `made`."""

    def __init__(self, made: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(made.__dict__)


class L1Proposals(Made, RegionProposalNetwork):
    """`made` by torchvision, with L1 instead of smooth L1 for boxes."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses of objectness and of boxes, both divided by the number of all sampled anchors."""
        inside, outside = (torch.cat(drawn).bool() for drawn in self.fg_bg_sampler(labels))
        drawn = inside | outside
        sought = F.binary_cross_entropy_with_logits(objectness.flatten()[drawn], torch.cat(labels)[drawn])
        moved = F.l1_loss(pred_bbox_deltas[inside], torch.cat(regression_targets)[inside], reduction="sum")
        return sought, moved / drawn.sum()


class RegionHeads(Made, RoIHeads):
    """`made` by torchvision, with L1 instead of smooth L1 for boxes, and target masks that are sampled as features are.

    Target masks are sampled at the centres of pixels, and binary.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if targets is None:
            return super().forward(features, proposals, image_shapes)
        proposals, matches, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.boxes(features, proposals, image_shapes)
        flat = torch.cat(labels)
        inside = torch.where(flat > 0)[0]
        moved = deltas.view(len(deltas), -1, 4)[inside, flat[inside]]
        losses = {
            "loss_classifier": F.cross_entropy(logits, flat),
            "loss_box_reg": F.l1_loss(moved, torch.cat(wanted)[inside], reduction="sum") / len(flat),
        }
        if self.has_mask():
            losses["loss_mask"] = self.mask_loss(features, proposals, image_shapes, matches, labels, targets)
        return [], losses

    def boxes(
        self, features: dict[str, Tensor], regions: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Logits (regions of all images, classes) and deltas (regions, classes * 4)."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, regions, image_shapes)))

    def masks(self, features: dict[str, Tensor], regions: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Logits (regions of all images, classes, m, m)."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, image_shapes)))

    def mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        matches: list[Tensor],
        labels: list[Tensor],
        targets: Targets,
    ) -> Tensor:
        """Mean cross entropy of the masks in regions that hold an object; `matches` are the objects' indices."""
        inside = [torch.where(label > 0)[0] for label in labels]
        regions = [box[i] for box, i in zip(proposals, inside, strict=True)]
        logits = self.masks(features, regions, image_shapes)
        if not len(logits):
            return logits.sum() * 0  # a mean of none would be NaN
        truth = [
            masks_in(target["masks"], match[i], boxes, logits.shape[-1])
            for target, match, i, boxes in zip(targets, matches, inside, regions, strict=True)
        ]
        classes = torch.cat([label[i] for label, i in zip(labels, inside, strict=True)])
        found = logits[torch.arange(len(classes), device=classes.device), classes]
        return F.binary_cross_entropy_with_logits(found, torch.cat(truth).to(found.dtype))


def masks_in(masks: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """(N, side, side): the parts of each box that its mask, `which` (N) of (M, h, w), covers by half or more."""
    regions = torch.cat([which[:, None].to(boxes.dtype), boxes], 1)
    return roi_align(masks[:, None].to(boxes.dtype), regions, (side, side), 1.0, 0, aligned=True)[:, 0] >= 0.5


def rcnn_heads(
    channels: int, num_classes: int, strides: list[int], *, masks: bool, anchor_size: float = 8, **kwargs: Any
) -> TwoStage:
    """Heads of Mask R-CNN (https://arxiv.org/abs/1703.06870), or, without `masks`, of Faster R-CNN.

    channels     of each map
    num_classes  without the background
    strides      pixels of the image per pixel of each map; regions are pooled from all but the last
    anchor_size  side of an anchor in pixels of its map
    kwargs       of `torchvision.models.detection.MaskRCNN`
    """
    kwargs = {"rpn_post_nms_top_n_train": 1000, **kwargs}
    model = torchvision_model(channels, num_classes, strides, masks=masks, anchor_size=anchor_size, **kwargs)
    return TwoStage(L1Proposals(model.rpn), RegionHeads(model.roi_heads))


def torchvision_model(
    channels: int, num_classes: int, strides: list[int], *, masks: bool, anchor_size: float, **kwargs: Any
) -> FasterRCNN:
    """torchvision's model with the anchors, pooling and matching of mmdet; arguments as in `rcnn_heads`."""
    anchors = Anchors(strides, [[anchor_size * stride] for stride in strides])
    pools: dict[str, Any] = {"box_roi_pool": AlignedPooler(strides[:-1], 7)}
    if masks:
        pools["mask_roi_pool"] = AlignedPooler(strides[:-1], 14)
    kind = MaskRCNN if masks else FasterRCNN
    model = kind(Given(channels), num_classes + 1, rpn_anchor_generator=anchors, **{**pools, **kwargs})
    predicts_in_single(model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor)
    model.rpn.proposal_matcher = BestMatcher(model.rpn.proposal_matcher, floor=0.3)
    model.rpn.min_size = torch.finfo(torch.float32).tiny  # any width and height
    return model
