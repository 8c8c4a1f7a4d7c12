"""Object detection: a backbone, an FPN, and torchvision's heads, with mmdet's arithmetic where that is the published.

What is exact with mmdet's files: for RetinaNet, Faster, Mask and Cascade R-CNN everything (maps, boxes, scores, labels
and masks) except for the pixels of an image that another library resized. But mmdet's R-CNNs also return boxes with a
side below 0.01 pixels, which are left out here, and in mmdet no side shrinks below 1/62 of an anchor's or region's,
where torchvision limits only growth. No released file of Cascade was ever read; for the same weights it gives mmdet's
results. FCOS is torchvision's, which lacks mmdet's factor for each level: mmdet's FCOS does not load.

FCOS has torchvision's losses. All others have mmdet's, given the same sampling, except for what is learned from:
- in a batch with larger images, mmdet ignores anchors beyond an image's own size, padded to a multiple of 32, and in
  Cascade those that cross the border of the image; here all anchors count
- in mmdet's Mask R-CNN an object gets the region that is best for it, even if another object overlaps with that region
  more; here each region learns the object that it overlaps with most
- in mmdet's RetinaNet an object that overlaps with no anchor, such as one outside of the image, is learned by all; here
  by none
New layers start from torchvision's initialisation: that of linear layers differs from mmdet's.
"""

from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList

from ..blocks import check_count
from ..convert import Layout
from ..layouts.detectors import CASCADE, NO_RELEASE, OUR_HEADS, RCNN, RETINANET
from .cascade import cascade_heads
from .dense_detectors import FCOSHeads, RetinaNetHeads, Targets
from .features import OverBackbone, backbone_of, maps
from .fpn import FPN
from .paste import paste
from .plain import pyramid_of
from .rcnn import TwoStage, rcnn_heads

# head -> how many features it reads, the layout of mmdet's files
HEADS = {
    "mask_rcnn": (4, RCNN),
    "faster_rcnn": (4, RCNN),
    "cascade_mask_rcnn": (4, CASCADE),
    "retinanet": (3, RETINANET),
    "fcos": (3, NO_RELEASE),
}
# head -> torchvision's class that takes its `head_kwargs`
TAKES = {
    "mask_rcnn": MaskRCNN,
    "faster_rcnn": FasterRCNN,
    "cascade_mask_rcnn": FasterRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}
# arguments of that class that are given by other means, or that resize images, which is left to the caller
OURS_TO_SAY = {"backbone", "num_classes", "kwargs", "min_size", "max_size", "image_mean", "image_std"}
OURS_TO_SAY |= {"anchor_generator", "rpn_anchor_generator"}


def detector(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    head: str = "mask_rcnn",
    channels: int = 256,
    anchor_size: float | None = None,
    norm_eval: bool = False,
    pretrained: bool = False,
    head_kwargs: dict[str, Any] | None = None,
    **backbone_kwargs: Any,
) -> "Detector":
    """A detector on any backbone of the zoo, or any timm model whose features are each at twice the stride of the one
    before, or all at one stride.

    backbone     a name for `timm.create_model`, which gets `pretrained` and `backbone_kwargs`; or a module that returns
                 a list of NCHW maps, fine to coarse, and has timm's `feature_info`
    num_classes  without the background
    head         "mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "retinanet" or "fcos"
    channels     of the pyramid
    anchor_size  side of the (smallest) anchor in pixels of its map: 8, and 4 for RetinaNet, which has three; not FCOS
    norm_eval    batch norms of the backbone keep their statistics in training; their factors and shifts are trained
    head_kwargs  arguments of torchvision's class, such as `score_thresh` (`box_score_thresh` for an R-CNN; for Cascade,
                 whose stages are as published, only those of the region proposal network, `rpn_...`)
    R-CNNs read four maps, or all three of a backbone that has no more, and the others three. Raises ValueError for an
    unknown head, no classes or channels, arguments that the head does not read, anchors for FCOS, or a backbone whose
    maps do not halve from one to the next.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}")
    check_count("num_classes", num_classes, "the number of classes")
    check_count("channels", channels, "channels of the pyramid")
    levels, layout = HEADS[head]
    features = backbone_of(backbone, levels, pretrained=pretrained, **backbone_kwargs)
    dims, strides = (
        values[-levels:] for values in (features.feature_info.channels(), features.feature_info.reduction())
    )
    pyramid, strides = pyramid_of(dims, strides)
    if any(2 * fine != coarse for fine, coarse in pairwise(strides)):
        raise ValueError(
            f"the features are at strides {list(strides)}; a detector needs each to be twice the one before"
        )
    kwargs = dict(head_kwargs or {})
    _check_read(head, kwargs)
    if anchor_size is not None:
        if head == "fcos":
            raise ValueError("anchor_size is given, but FCOS has no anchors")
        kwargs["anchor_size"] = anchor_size
    if head == "fcos" and channels % 32:
        raise ValueError(f"channels is {channels}; it must be a multiple of 32, since FCOS normalises 32 groups")
    dense = head in ("retinanet", "fcos")
    neck = FPN(dims, channels, extra=2 if dense else 1, convolved=dense)
    divisor = strides[-1]
    strides = [*strides, *(strides[-1] * 2**i for i in range(1, 3 if dense else 2))]
    heads = _heads(head, channels, num_classes, strides, kwargs)
    options = {"pyramid": pyramid, "divisor": divisor, "norm_eval": norm_eval}
    return Detector(features, neck, heads, num_classes, layout, **options)


def _check_read(head: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments that nothing would read: torchvision's classes take any."""
    known = [name for name in signature(TAKES[head]).parameters if name not in OURS_TO_SAY]
    if head == "cascade_mask_rcnn":
        known = [name for name in known if name.startswith("rpn_")]
    if unread := [name for name in kwargs if name not in known]:
        raise ValueError(
            f"head_kwargs has {', '.join(unread)}, which {head} does not read; it reads {', '.join(known)}"
        )


def _heads(head: str, channels: int, num_classes: int, strides: list[int], kwargs: dict[str, Any]) -> nn.Module:
    if head == "retinanet":
        return RetinaNetHeads(channels, num_classes, strides, **kwargs)
    if head == "fcos":
        return FCOSHeads(channels, num_classes, strides, **kwargs)
    if head == "cascade_mask_rcnn":
        return cascade_heads(channels, num_classes, strides, **kwargs)
    return rcnn_heads(channels, num_classes, strides, masks=head == "mask_rcnn", **kwargs)


def _class_layers(heads: nn.Module) -> list[str]:
    """The layers with rows for each class; the RPN's tell objects from background, whatever the classes are."""
    ends = ("classification_head.cls_logits", "box_predictor.cls_score", "box_predictor.bbox_pred", "mask_fcn_logits")
    return [name for name, _ in heads.named_modules() if name.endswith(ends)]


class Detector(OverBackbone):
    """Images to detections, or, in training and with targets, to losses.

    backbone     (B, 3, H, W) -> maps, fine to coarse; has timm's `feature_info`
    neck         maps -> maps of one width, and coarser ones
    pyramid      turns the backbone's maps, if they all have one stride, into maps of several strides for the neck
    heads        `ImageList`, maps, targets -> losses, or detections; a `TwoStage` counts labels from 1
    num_classes  without the background
    layout       of mmdet's files
    divisor      sides of images are padded to multiples of it; None: the stride of the backbone's last map
    norm_eval    batch norms of the backbone stay in evaluation mode
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: FPN,
        heads: nn.Module,
        num_classes: int,
        layout: Layout,
        *,
        pyramid: nn.Module | None = None,
        divisor: int | None = None,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = nn.Identity() if pyramid is None else pyramid
        self.neck = neck
        self.heads = heads
        self.num_classes = num_classes
        self.layout = layout
        self.levels = len(neck.laterals)
        self.first_label = 1 if isinstance(heads, TwoStage) else 0
        self.divisor = divisor or backbone.feature_info.reduction()[-1]
        # what zoo.load_checkpoint initialises anew for another number of classes
        self.pretrained_cfg = {"classifier": tuple(f"heads.{name}" for name in _class_layers(heads))}
        self.norm_eval = norm_eval
        self.train()

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        for module in self.backbone.modules() if self.norm_eval else ():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        return self

    def layouts(self) -> tuple[Layout, ...]:
        """How files name a whole detector with this backbone: mmdet's names around each of its layouts, then ours."""
        return self.layouts_around(self.layout, OUR_HEADS)

    @property
    def has_masks(self) -> bool:
        return any(name.endswith("mask_head") for name, _ in self.heads.named_modules())

    @torch.compiler.disable(recursive=False)  # maps are compiled; the rest depends on how many objects there are
    def forward(self, images: list[Tensor], targets: Targets | None = None, *, paste_masks: bool = True) -> Any:
        """In training, losses by name, to be minimised as a sum; in evaluation, detections, one dict per image.

        images   (3, h, w) each, normalised; they are padded with zeros at the bottom and right to one size
        targets  a dict for each: boxes (N, 4) x1, y1, x2, y2 in pixels, floats, labels (N) from 0, integers, and, if
                 the head predicts masks, masks (N, h, w); N may be 0
        A detection has boxes, labels and scores, and masks (N, 1, h, w) of probabilities, pasted into the image; or,
        without `paste_masks`, `box_masks` (N, 1, m, m) inside the boxes, which `zoo.heads.paste.paste` puts into an
        image of any size: pasted once, at the size of the original, they are most exact, and take little memory before.

        Raises ValueError for no images, and for targets that are missing, not of this form, or given in evaluation.
        """
        if self.training != (targets is not None):
            state, given = ("train", "no targets") if self.training else ("eval", "targets")
            raise ValueError(
                f"the detector is in {state} mode and got {given}; it returns losses in train mode with targets, and "
                "detections in eval mode without"
            )
        if not len(images):
            raise ValueError("there are no images; expected a list of one or more, (3, h, w) each")
        if targets is not None:
            targets = self._checked(images, targets)
        batch = self._batch(images)
        out = self._answers(batch, self._features(batch.tensors), targets)
        return out if targets is not None else self._finish(out, batch.image_sizes, paste_masks)

    def _features(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.pyramid(maps(self.backbone, images, self.levels)))

    @torch.compiler.disable
    def _answers(self, batch: ImageList, features: list[Tensor], targets: Targets | None) -> Any:
        return self.heads(batch, features, targets)

    @torch.compiler.disable
    def _batch(self, images: list[Tensor]) -> ImageList:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (-(-max(side) // self.divisor) * self.divisor for side in zip(*sizes, strict=True))
        padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        return ImageList(torch.stack(padded), sizes)

    @torch.compiler.disable
    def _checked(self, images: list[Tensor], targets: Targets) -> Targets:
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images and {len(targets)} targets; expected one for each")
        out = []
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            if said := self._complaint(image, target):
                raise ValueError(f"target {i}: {said}")
            out.append({**target, "labels": target["labels"].long() + self.first_label})
        return out

    def _complaint(self, image: Tensor, target: dict[str, Tensor]) -> str:
        """What is wrong with a target, if anything."""
        need = ("boxes", "labels", *["masks"] * self.has_masks)
        if missing := [key for key in need if key not in target]:
            return f"it has no {', '.join(missing)}"
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            return f"boxes are {tuple(boxes.shape)} and labels {tuple(labels.shape)}; expected (N, 4) and (N)"
        if not boxes.is_floating_point() or labels.is_floating_point():
            return f"boxes are {boxes.dtype} and labels {labels.dtype}; expected floats and integers"
        if not boxes.isfinite().all():
            return "a box has a corner that is not a finite number"
        if len(boxes) and not (boxes[:, 2:] > boxes[:, :2]).all():
            return "a box has no width or no height; expected x1 < x2 and y1 < y2"
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            return f"labels are {int(labels.min())} to {int(labels.max())}; expected 0 to {self.num_classes - 1}"
        if self.has_masks and tuple(target["masks"].shape) != (len(boxes), *image.shape[1:]):
            return f"masks are {tuple(target['masks'].shape)}; expected {(len(boxes), *image.shape[1:])}"
        return ""

    @torch.compiler.disable
    def _finish(
        self, detections: list[dict[str, Tensor]], sizes: list[tuple[int, int]], paste_masks: bool
    ) -> list[dict[str, Tensor]]:
        for found, size in zip(detections, sizes, strict=True):
            found["labels"] = found["labels"] - self.first_label
            if "masks" in found:
                masks = found.pop("masks")
                found |= {"masks": paste(masks, found["boxes"], size)} if paste_masks else {"box_masks": masks}
        return detections
