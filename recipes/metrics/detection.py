"""Average precision of boxes and masks as defined by COCO, with pycocotools.

https://cocodataset.org/#detection-eval
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes import distributed
from recipes.config import ConfigError
from recipes.data import DataError
from zoo.heads.paste import within

SHOWN = 6  # predictions that are kept for a picture
KINDS = {"bbox": "box", "segm": "mask"}  # pycocotools' name: ours
STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}


class Detection:
    """Box AP, and mask AP if predictions have masks, in percent; every image counts once, whichever process saw it.

    Predictions are resized to their image before they are compared, one mask at a time. The results of all processes
    are merged in the order of images, so that equal scores are ranked as by a single process.
    """

    def __init__(self, names: Sequence[str], masks: bool):
        self.names, self.kinds = names, ("bbox", "segm") if masks else ("bbox",)
        self.tools = pycocotools()
        self.images: dict[int, dict[str, Any]] = {}
        self.values: dict[str, float] = {}  # what `compute` found
        self.shown: list[tuple[dict[str, Any], dict[str, Any]]] = []  # prediction, target

    def update(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
        """A prediction has boxes (N, 4) xyxy, labels, scores and its `size` (h, w), and perhaps masks as for `at_size`.

        A target has `index` and `size` of its image, boxes, labels, `area`, `crowd`, perhaps masks, at that size, and
        `shown`, the index of the image actually shown, if it is another.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            prediction, size = _here(prediction), tuple(map(int, target["size"]))
            masks, more = masks_at(prediction, size), {"score": prediction["scores"].tolist()}
            true = {"area": target["area"].tolist(), "iscrowd": target["crowd"].int().tolist()}
            self.images[int(target["index"])] = {
                "size": size,
                "true": self._records(target, target.get("masks", ()), **true),
                "found": self._records({**prediction, "boxes": boxes_at(prediction, size)}, masks, **more),
            }
            if len(self.shown) < SHOWN:
                extra = {"size": size, "shown": target.get("shown", target["index"])}
                self.shown.append((prediction, {**_here(target), **extra}))

    def compute(self) -> dict[str, float]:
        """Metrics over all processes, which must all call this. Raises DataError if there is no object to find."""
        images = {index: image for part in distributed.gathered(self.images) for index, image in part.items()}
        self.values = distributed.first(lambda: self._measured(dict(sorted(images.items()))))
        return self.values

    def _measured(self, images: dict[int, dict[str, Any]]) -> dict[str, float]:
        values: dict[str, float] = {}
        for kind in self.kinds:
            measured = evaluated(images, len(self.names), kind)
            values |= {f"{KINDS[kind]}_{key}": round(100 * float(measured.stats[at]), 4) for key, at in STATS.items()}
            values |= {f"{KINDS[kind]}_ap/{name}": value for name, value in self._each(measured)}
        if values["box_ap"] < 0:
            raise DataError("the validation set has no object to find: there is nothing to evaluate")
        return {key: value for key, value in values.items() if value >= 0}  # -1: there are no such objects

    def _each(self, measured: Any) -> list[tuple[str, float]]:
        """AP of each class: mean over thresholds and recalls, all areas, 100 detections."""
        precision = measured.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes)
        return [(name, round(100 * float(precision[..., k].mean()), 4)) for k, name in enumerate(self.names)]

    def _records(self, objects: dict[str, Any], masks: Iterable[Tensor], **more: list[Any]) -> list[dict[str, Any]]:
        boxes = objects["boxes"].double().cpu().numpy().reshape(-1, 4)
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()  # x, y, width, height
        columns = {"bbox": boxes, "category_id": (objects["labels"].cpu() + 1).tolist(), **more}
        if "segm" in self.kinds:
            drawn = (np.asfortranarray(mask.cpu().numpy().astype(np.uint8)) for mask in masks)  # (H, W)
            columns["segmentation"] = [self.tools.encode(mask) for mask in drawn]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def at_size(prediction: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """Boxes and masks for an image of `prediction["size"]`, converted to another size (H, W) of that image.

    Masks come as values in 0 ... 1: `masks` (N, h, w) or (N, 1, h, w) of the whole image, or `box_masks` (N, 1, m, m)
    inside the boxes, which are pasted once, at the size asked for. They are returned as `masks` (N, H, W) bool.
    """
    prediction, size = _here(prediction), tuple(map(int, size))
    found = {key: prediction[key] for key in ("labels", "scores") if key in prediction}
    found |= {"size": size, "boxes": boxes_at(prediction, size)}
    if {"masks", "box_masks"} & prediction.keys():
        found["masks"] = torch.zeros(len(found["boxes"]), *size, dtype=torch.bool)
        for place, mask in zip(found["masks"], masks_at(prediction, size), strict=True):
            place.copy_(mask)
    return found


def masks_at(prediction: dict[str, Any], size: tuple[int, int]) -> Iterator[Tensor]:
    """The masks of `at_size`, (H, W) each, one at a time: many large ones would not fit into memory."""
    if "box_masks" in prediction:
        for mask, box in zip(prediction["box_masks"], boxes_at(prediction, size).tolist(), strict=True):
            drawn = torch.zeros(size[1], size[0], dtype=torch.bool).T  # as pycocotools reads it, column by column
            rows, columns, part = within(mask, box, size)
            drawn[rows, columns] = part[0] >= 0.5
            yield drawn
    for mask in prediction["masks"].flatten(0, -3) if "masks" in prediction else ():
        same = mask.shape == size
        yield (mask if same else F.interpolate(mask[None, None].float(), size, mode="bilinear")[0, 0]) >= 0.5


def boxes_at(prediction: dict[str, Any], size: Sequence[int]) -> Tensor:
    """The boxes of `at_size` alone."""
    down, across = (int(now) / int(before) for now, before in zip(size, prediction["size"], strict=True))
    return prediction["boxes"].detach().cpu() * torch.tensor([across, down] * 2)


def _here(objects: dict[str, Any]) -> dict[str, Any]:
    """All tensors on the CPU, where pycocotools computes."""
    return {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in objects.items()}


def evaluated(images: dict[int, dict[str, Any]], classes: int, kind: str) -> Any:
    """pycocotools' COCOeval after a run; `kind` is bbox or segm. Its printed output is discarded."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        measured = COCOeval(_coco(images, "true", classes, kind), _coco(images, "found", classes, kind), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured


def _coco(images: dict[int, dict[str, Any]], which: str, classes: int, kind: str) -> Any:
    """Records as a pycocotools COCO object; its own reader cannot read a file without any detection."""
    from pycocotools.coco import COCO

    records = [{"image_id": index, "iscrowd": 0, **record} for index in images for record in images[index][which]]
    for number, record in enumerate(records, 1):
        record["id"] = number
        record.setdefault("area", _area(record, kind))
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": index, "height": image["size"][0], "width": image["size"][1]} for index, image in images.items()
        ],
        "categories": [{"id": number} for number in range(1, classes + 1)],
        "annotations": records,
    }
    coco.createIndex()
    return coco


def _area(record: dict[str, Any], kind: str) -> float:
    """The area of a detection, small, medium or large, of box or mask; pycocotools uses boxes for masks too."""
    return (
        float(pycocotools().area(record["segmentation"])) if kind == "segm" else record["bbox"][2] * record["bbox"][3]
    )


def pycocotools() -> Any:
    """The module of masks. Raises ConfigError if the package is missing."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ConfigError("task=detect needs the package pycocotools: pip install pycocotools") from error
    return mask
