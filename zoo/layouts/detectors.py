"""Detectors in mmdetection's names: `backbone.` in a layout of the backbone's class, `neck.` and the heads.

Background is the last class in mmdetection and the first in torchvision's heads, which also have rows for its box and
its mask: these rows are zeros.
"""

from functools import partial

import torch
from torch import Tensor

from ..convert import Change, Layout
from .segmenters import NECK


# no lambdas: a detector holds its layout, and must be picklable
def _with_zeros(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x.new_zeros(rows, *x.shape[1:]), x])


def _without(x: Tensor, rows: int) -> Tensor:
    return x[rows:]


def _zeros_first(rows: int) -> Change:
    return Change(partial(_with_zeros, rows=rows), partial(_without, rows=rows))


BACKGROUND = Change(partial(torch.roll, shifts=1, dims=0), partial(torch.roll, shifts=-1, dims=0))
RPN = {"rpn_conv": "conv.0.0", "rpn_cls": "cls_logits", "rpn_reg": "bbox_pred"}


def _roi_rules(theirs: str, ours: str, box: dict[str, str]) -> dict[str, str]:
    """Rules of the heads on regions; `theirs` and `ours` number the stages of a cascade, or are empty."""
    heads = f"heads.roi_heads{ours}"
    return {
        **{f"roi_head.bbox_head{theirs}.{key}": f"{heads}.{value}" for key, value in box.items()},
        f"roi_head.bbox_head{theirs}.fc_cls": f"{heads}.box_predictor.cls_score",
        f"roi_head.bbox_head{theirs}.fc_reg": f"{heads}.box_predictor.bbox_pred",
        f"roi_head.mask_head{theirs}.convs.{{j}}.conv": f"{heads}.mask_head.{{j}}.0",
        f"roi_head.mask_head{theirs}.upsample": f"{heads}.mask_predictor.conv5_mask",
        f"roi_head.mask_head{theirs}.conv_logits": f"{heads}.mask_predictor.mask_fcn_logits",
    }


def _roi_changes(ours: str) -> dict[str, Change]:
    heads = f"heads.roi_heads{ours}"
    return {
        f"{heads}.box_predictor.cls_score": BACKGROUND,
        f"{heads}.box_predictor.bbox_pred": _zeros_first(4),
        f"{heads}.mask_predictor.mask_fcn_logits": _zeros_first(1),
    }


def _two_stage(theirs: str, ours: str, box: dict[str, str]) -> Layout:
    rpn = {f"rpn_head.{key}": f"heads.rpn.head.{value}" for key, value in RPN.items()}
    return Layout("mmdet", {**NECK, **rpn, **_roi_rules(theirs, ours, box)}, changes=_roi_changes(ours))


RCNN = _two_stage("", "", {"shared_fcs.0": "box_head.fc6", "shared_fcs.1": "box_head.fc7"})
CASCADE = _two_stage(
    ".{i}",
    ".{i}",
    {
        "shared_convs.{j}.conv": "box_head.{j}.0",
        "shared_convs.{j}.bn": "box_head.{j}.1",
        "shared_fcs.0": "box_head.5",
    },
)
RETINANET = Layout(
    "mmdet",
    rules={
        **NECK,
        "bbox_head.cls_convs.{i}.conv": "heads.head.classification_head.conv.{i}.0",
        "bbox_head.reg_convs.{i}.conv": "heads.head.regression_head.conv.{i}.0",
        "bbox_head.retina_cls": "heads.head.classification_head.cls_logits",
        "bbox_head.retina_reg": "heads.head.regression_head.bbox_reg",
    },
)
NO_RELEASE = Layout("mmdet", rules={})
OUR_HEADS = Layout("zoo", rules={part: part for part in ("pyramid", "neck", "heads")})
