"""Cascade (Mask) R-CNN, which torchvision lacks: stages of heads on regions that each stage refines for the next."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

from .anchors import AlignedPooler
from .dense_detectors import Targets
from .precision import predicts_in_single
from .rcnn import RegionHeads, TwoStage, torchvision_model

IOUS = (0.5, 0.6, 0.7)
# deviations of the deltas of x, y, width and height in each stage; torchvision multiplies by their inverses
BOX_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
Shapes = list[tuple[int, int]]


def cascade_heads(
    channels: int, num_classes: int, strides: list[int], *, anchor_size: float = 8, **kwargs: Any
) -> TwoStage:
    """Heads of Cascade Mask R-CNN (https://arxiv.org/abs/1712.00726) as with NAT, DiNAT and GC ViT.

    Three stages, each with four convolutions and a linear layer for boxes, whose batch norms are synchronised over
    devices in the published runs, and with a mask head. The loss of boxes is 10 times GIoU, class by class.

    Arguments as in `rcnn_heads`; `kwargs` are those of the region proposal network.
    """
    rpn = torchvision_model(channels, num_classes, strides, masks=False, anchor_size=anchor_size, **kwargs).rpn
    stages = [_stage(channels, num_classes + 1, strides[:-1], *row) for row in zip(IOUS, BOX_STDS, strict=True)]
    return TwoStage(rpn, CascadeRoIHeads(stages))


def _stage(channels: int, classes: int, strides: list[int], iou: float, stds: tuple[float, ...]) -> RegionHeads:
    stage = RoIHeads(
        AlignedPooler(strides, 7),
        FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [1024], nn.BatchNorm2d),
        FastRCNNPredictor(1024, classes),
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=tuple(1 / std for std in stds),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_roi_pool=AlignedPooler(strides, 14),
        mask_head=MaskRCNNHeads(channels, [256] * 4, 1),
        mask_predictor=MaskRCNNPredictor(256, 256, classes),
    )
    predicts_in_single(stage.box_predictor, stage.mask_predictor)
    return RegionHeads(stage)


class CascadeRoIHeads(nn.ModuleList):
    """Stages of `RegionHeads`, called like one of them.

    Scores are those of the stages' mean logits, masks the mean of their probabilities, boxes the last stage's.
    """

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Shapes, targets: Targets | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if targets is None:
            return self._detect(features, proposals, image_shapes), {}
        losses: dict[str, Tensor] = {}
        for i, (stage, weight) in enumerate(zip(self, LOSS_WEIGHTS, strict=True)):
            found, proposals = _train(stage, features, proposals, image_shapes, targets)
            losses |= {f"{name}_{i}": weight * loss for name, loss in found.items()}
        return [], losses

    def _detect(self, features: dict[str, Tensor], proposals: list[Tensor], shapes: Shapes) -> list[dict[str, Tensor]]:
        scores = []
        for i, stage in enumerate(self):
            logits, deltas = stage.boxes(features, proposals, shapes)
            scores.append(logits)
            if i < len(self) - 1:
                proposals = _refine(stage, proposals, deltas, logits[:, 1:].argmax(1) + 1, shapes)
        mean = torch.stack(scores).mean(0)
        found = self[-1].postprocess_detections(mean, deltas, proposals, shapes)
        out = [dict(zip(("boxes", "scores", "labels"), row, strict=True)) for row in zip(*found, strict=True)]
        masks = [self._masks(stage, features, out, shapes) for stage in self]
        for i, detections in enumerate(out):
            detections["masks"] = torch.stack([stage[i] for stage in masks]).mean(0)
        return out

    @staticmethod
    def _masks(stage: RegionHeads, features: dict[str, Tensor], found: list[dict[str, Tensor]], shapes: Shapes) -> Any:
        logits = stage.masks(features, [detections["boxes"] for detections in found], shapes)
        return maskrcnn_inference(logits, [detections["labels"] for detections in found])


def _decode(stage: RoIHeads, proposals: list[Tensor], deltas: Tensor, labels: Tensor) -> Tensor:
    """(N, 4): each region moved by the deltas of its class."""
    boxes = stage.box_coder.decode(deltas, proposals).reshape(len(deltas), deltas.shape[1] // 4, 4)
    return boxes[torch.arange(len(labels), device=labels.device), labels]


def _refine(stage: RoIHeads, proposals: list[Tensor], deltas: Tensor, labels: Tensor, shapes: Shapes) -> list[Tensor]:
    """The regions of each image for the next stage."""
    boxes = _decode(stage, proposals, deltas.detach(), labels).split([len(boxes) for boxes in proposals])
    return [clip_boxes_to_image(box, shape) for box, shape in zip(boxes, shapes, strict=True)]


def _train(
    stage: RegionHeads, features: dict[str, Tensor], proposals: list[Tensor], shapes: Shapes, targets: Targets
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The losses of a stage, not weighted yet, and the regions for the next."""
    proposals, matches, labels, _ = stage.select_training_samples(proposals, targets)
    logits, deltas = stage.boxes(features, proposals, shapes)
    flat = torch.cat(labels)
    losses = {"loss_classifier": F.cross_entropy(logits, flat)}
    positive = flat > 0
    losses["loss_box_reg"] = _box_loss(stage, proposals, deltas, flat, positive, matches, targets)
    losses["loss_mask"] = stage.mask_loss(features, proposals, shapes, matches, labels, targets)
    refined = _refine(stage, proposals, deltas, torch.where(positive, flat, logits[:, 1:].argmax(1) + 1), shapes)
    # the objects themselves, which the sampling adds, are added again by the next stage
    kept = [~_among(box, t["boxes"]) for box, t in zip(proposals, targets, strict=True)]
    return losses, [box[keep] for box, keep in zip(refined, kept, strict=True)]


def _box_loss(
    stage: RoIHeads,
    proposals: list[Tensor],
    deltas: Tensor,
    labels: Tensor,
    positive: Tensor,
    matches: list[Tensor],
    targets: Targets,
) -> Tensor:
    """10 * GIoU loss of the regions that hold an object, divided by the number of all regions."""
    boxes = _decode(stage, proposals, deltas, labels)[positive]
    held = zip(targets, matches, (label > 0 for label in labels.split([len(m) for m in matches])), strict=True)
    objects = torch.cat([t["boxes"][match[inside]] for t, match, inside in held])
    loss = generalized_box_iou_loss(boxes, objects.to(boxes.dtype), reduction="sum")
    return 10 * loss / max(1, len(labels))


def _among(boxes: Tensor, objects: Tensor) -> Tensor:
    """Which of (N, 4) boxes are among (M, 4)."""
    return (boxes[:, None] == objects.to(boxes.dtype)[None]).all(2).any(1)
