"""What an evaluation predicted for each image, as files: tables, label maps and COCO's JSON."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from recipes import distributed
from recipes.data import Data
from recipes.data.coco import Coco
from recipes.data.encoded import Encoded
from recipes.eval_results import Record, as_csv
from recipes.metrics.classification import among, likeliest, of_model
from recipes.metrics.detection import Detection
from recipes.metrics.segmentation import at_size
from recipes.names import apart, file_names
from recipes.task import Answers

LIKELIEST = 5  # classes of an image that are recorded
DIGITS = 3  # decimals of a box, in pixels


class MostLikely(Answers):
    """`-images.csv`, with the most likely classes of every image, in the order of the data set.

    subset  the model's classes that are predicted, as in the metrics; None for all
    """

    def __init__(self, subset: tuple[int, ...] | None = None):
        self.subset, self.rows, self.seen = subset, [], 0

    def note(self, predictions: Tensor, targets: Tensor) -> None:
        """Logits (B, the model's classes) and labels (B,)."""
        logits = among(predictions.float().cpu(), self.subset)
        places = likeliest(logits, LIKELIEST)
        classes, shares = of_model(places, self.subset), logits.softmax(-1).gather(1, places)
        for label, chosen, share in zip(targets.tolist(), classes.tolist(), shares.tolist(), strict=True):
            index = distributed.rank() + self.seen * distributed.size()  # how an evaluation distributes images
            self.rows.append((index, label, chosen, [round(each, 6) for each in share]))
            self.seen += 1

    def files(self, data: Data, metrics: Any) -> dict[str, bytes]:
        return {"-images.csv": as_csv(self.table(data))}

    def table(self, data: Data) -> list[Record]:
        """One row per image, with its label; all processes must call this."""
        own = [_without_answer(data, *row) if row[0] in data.val.named else row for row in self.rows]
        rows = sorted(row for part in distributed.gathered(own) for row in part)
        return [_answer(data, *row) for row in rows]


class LabelMaps(Answers):
    """`-labels/`, a PNG with a class for every pixel of each image, at its own size.

    A file is named after its image, or by number where images are in no files; see `_names`.

    values  those that stand for class 0, 1, ... in the data set's masks; None for the numbers themselves
    """

    def __init__(self, values: Sequence[int] | None):
        self.values = None if values is None else np.array(values, np.uint8)
        self.maps: dict[int, bytes] = {}

    def note(self, predictions: list[Tensor], targets: list[dict[str, Any]]) -> None:
        """Logits (classes, h, w) and targets as the metrics take them, with `index` and `shown`."""
        for logits, target in zip(predictions, targets, strict=True):
            if target["shown"] == target["index"]:
                found = at_size(logits.float(), target["labels"].shape).argmax(0).byte().cpu().numpy()
                self.maps[int(target["index"])] = _png(found if self.values is None else self.values[found])

    def files(self, data: Data, metrics: Any) -> dict[str, bytes]:
        maps = {index: png for part in distributed.gathered(self.maps) for index, png in part.items()}
        names = _names(data.val.records, len(data.val))
        return {f"-labels/{names[index]}.png": maps[index] for index in sorted(maps)}


class Objects(Answers):
    """`-objects.json`, what was found in all images, in COCO's format of results.

    https://cocodataset.org/#format-results. An object has `image_id`, `category_id`, `bbox`, `score` and, of heads that
    predict masks, `segmentation`. The numbers are those of the annotation file; without one an image has its index,
    and a class its number, from 1 on.
    """

    def files(self, data: Data, metrics: Detection) -> dict[str, bytes]:
        own = {index: image["found"] for index, image in metrics.images.items() if index not in data.val.named}
        images = {index: found for part in distributed.gathered(own) for index, found in part.items()}
        records = data.val.records
        objects = [_object(records, index, found) for index in sorted(images) for found in images[index]]
        return {"-objects.json": json.dumps(objects).encode()}


def _without_answer(data: Data, index: int, _: int, chosen: list[int], shares: list[float]) -> tuple[Any, ...]:
    return index, data.val.label(index), [""] * len(chosen), [""] * len(shares)


def _answer(data: Data, index: int, label: int, chosen: list[int | str], shares: list[float | str]) -> Record:
    row = {"image": data.val.where(index), "label": _label(data, label)}
    for place, (cls, share) in enumerate(zip(chosen, shares, strict=True), 1):
        row |= {f"class{place}": cls, f"share{place}": share}
    return row


def _label(data: Data, label: int) -> int | str:
    """A label as a class of the model; all labels of the image, separated by spaces, if it has several."""
    if data.truths is not None:
        return " ".join(str(truth) for truth in data.truths[label] if truth >= 0)
    return label if data.subset is None else data.subset[label]


def _names(records: Any, count: int) -> list[str]:
    """Names for the label maps of all images, so that none depends on which of the others have an answer.

    Images that are called alike are told apart by the folders below the one that has all of them, then by suffixes.
    """
    numbers = [f"{index:06d}" for index in range(count)]
    found = [records.path_of(index) if isinstance(records, Encoded) else "" for index in range(count)]
    below = iter(apart([path for path in found if path]))
    whole = [next(below) if path else number for path, number in zip(found, numbers, strict=True)]
    bare = [os.path.splitext(path)[0] for path in whole]
    times = Counter(bare)
    paths = [path if times[short] > 1 else short for path, short in zip(whole, bare, strict=True)]
    own = [Path(path).stem.lstrip("./") or number for path, number in zip(whole, numbers, strict=True)]
    return file_names(paths, own, ".png")


def _png(labels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


def _object(records: Any, index: int, found: dict[str, Any]) -> dict[str, Any]:
    """One of the metrics' records of an image, in COCO's format of results."""
    image, category = index, found["category_id"]
    if isinstance(records, Coco):
        image, category = records.numbers[index], records.categories[category - 1]
    one = {
        "image_id": image,
        "category_id": category,
        "bbox": [round(side, DIGITS) for side in found["bbox"]],
        "score": found["score"],
    }
    if "segmentation" in found:
        code = found["segmentation"]
        one["segmentation"] = {**code, "counts": code["counts"].decode()}
    return one
