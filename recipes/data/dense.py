"""Sources with dense labels: a class for every pixel, or boxes and masks of objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from recipes.data import coco, masks, paired, scenes
from recipes.data.build import Data, Preprocessing, preprocessing, source_options, splits_of
from recipes.data.encoded import Encoded
from recipes.data.errors import BadImage, DataError, Misread, NoBatch
from recipes.data.files import looking
from recipes.data.paired import IGNORE, mapped
from recipes.data.seeding import Stream, reseed
from recipes.data.source import Source
from recipes.data.transforms import Normalize
from zoo.blocks import plain
from zoo.errors import listed

READERS = {"scenes": scenes, "masks": masks, "arrow_masks": masks, "coco": coco}


class Records(Protocol):
    """The images of a data set and their labels. Each offers one of the last two methods, or both."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image: ...

    def where(self, index: int) -> str: ...

    def semantic(self, index: int) -> np.ndarray:
        """(H, W) integers: a class, or 255 for unlabelled pixels."""

    def instances(self, index: int, *, masks: bool) -> dict[str, Any]:
        """boxes (N, 4) float32 xyxy, labels, area, crowd (N,), masks (N, H, W) bool if wanted, and `size` (H, W)."""


class Dense(Source, ABC):
    """A split with dense labels; everything random is a function of (seed, epoch, index), as in its base.

    classes    number of classes, to check labels against
    normalize  applied after the transform
    """

    # it is unknown whether the labels of such an image are rotated too
    tag_advice = "set data.exif_orientation=true if its labels belong to the image as shown by viewers"

    def __init__(
        self,
        records: Records,
        transform: Callable[..., Any],
        *,
        normalize: Normalize,
        classes: int,
        train: bool,
        **options: Any,
    ):
        super().__init__(records, transform, **options)
        self.normalize, self.classes, self.train = normalize, classes, train

    def __len__(self) -> int:
        return len(self.records)

    @abstractmethod
    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """The target of an image of `size` (H, W), for the transform; raises BadImage if they do not match."""

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        image = self.image(index)
        return image, self.target(index, image.size[::-1])

    def _drawn(self, index: int, draws: tuple[int, int, int], finish: bool) -> tuple[Tensor, Any]:
        image, target = self.read(index)
        self._look_at_tag(image, index)
        reseed(Stream.SAMPLE, self.seed, *draws)
        planes = tv_tensors.Image(F.pil_to_tensor(image))
        # in evaluation only the image is rescaled: predictions are evaluated at the image's own size
        planes, target = self.transform(planes, target) if self.train else (self.transform(planes), target)
        planes = mapped(lambda part: part.as_subclass(Tensor).contiguous(), planes)
        labels = {key: value.as_subclass(Tensor) for key, value in target.items()}
        # an image that cannot be decoded is replaced: `index` is the requested one, `shown` the one actually used
        extra = {"index": draws[1], "shown": index, "size": (image.height, image.width)}
        return self.finish(planes) if finish else planes, {**labels, **extra}

    def misfit(self, index: int, message: str, size: tuple[int, int], labelled: tuple[int, int]) -> BadImage:
        """The error for labels of another size (H, W) than the image, with advice if the image is rotated."""
        if size == labelled[::-1] and isinstance(self.records, Encoded) and self.records.orientation(index) != 1:
            followed = self.records.decoding.exif_orientation
            return Misread(
                message,
                f"Its EXIF tag says that it is rotated, which is {'' if followed else 'not '}applied: "
                f"set data.exif_orientation={str(not followed).lower()}",
            )
        return BadImage(message)

    def collate(self, samples: list[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
        """Lists: images may have different sizes."""
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def finish(self, images: Any) -> Any:
        return mapped(super().finish, images)


class Semantic(Dense):
    """A class for every pixel. Training batches are (B, 3, H, W) and (B, H, W) int64; evaluation batches are lists.

    An image that is evaluated at several scales is itself a list.
    """

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        labels, where = self.records.semantic(index), self.where(index)
        if labels.shape != size:
            said = f"{where} has {_said(size)} pixels but its mask {_said(labels.shape)}: expected the same size"
            raise self.misfit(index, said, size, labels.shape)
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= self.classes))
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            raise Misread(
                f"the mask of {where} has label {labels[row, column]} at row {row}, column {column}: expected "
                f"0 ... {self.classes - 1}, or {IGNORE} for unlabelled pixels",
                masks.ADVICE,
            )
        return {"labels": tv_tensors.Mask(torch.from_numpy(labels.astype(np.uint8)))}

    def collate(self, samples: list[tuple[Tensor, Any]]) -> Any:
        images, targets = super().collate(
            [(image, {**target, "labels": target["labels"].long()}) for image, target in samples]
        )
        if not self.train:
            return images, targets
        sizes = sorted({_said(image.shape[1:]) for image in images})
        if len(sizes) > 1:
            raise NoBatch(
                f"images of {', '.join(sizes)} pixels cannot form a batch: set task.crop=true, or train.micro_batch=1, "
                "which keeps the batch size, or data.batch_size=1"
            )
        return torch.stack(images), torch.stack([target["labels"] for target in targets])


class Instances(Dense):
    """Boxes and masks. Batches are lists.

    In training, crowds, which are not single objects, are left out, and boxes are clipped to the image.

    masks  whether masks are needed beside the boxes
    """

    def __init__(self, *args: Any, masks: bool, **options: Any):
        super().__init__(*args, **options)
        self.masks = masks

    def target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        found, where = self.records.instances(index, masks=self.masks), self.where(index)
        labelled = tuple(found["size"])
        if labelled != size:
            said = f"{where} has {_said(size)} pixels, but its objects belong to an image of {_said(labelled)}"
            raise self.misfit(index, said, size, labelled)
        labels = found["labels"]
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.classes):
            raise BadImage(f"{where} has an object of class {labels.max()}: expected 0 ... {self.classes - 1}")
        kept = ~found["crowd"] if self.train else np.ones(len(labels), bool)
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(found["boxes"][kept]), format="XYXY", canvas_size=size)
        target = {
            "boxes": F.clamp_bounding_boxes(boxes) if self.train else boxes,
            **{key: torch.from_numpy(found[key][kept]) for key in ("labels", "area", "crowd")},
        }
        return target | ({"masks": tv_tensors.Mask(torch.from_numpy(found["masks"][kept]))} if self.masks else {})


KINDS = {"semantic": Semantic, "instances": Instances}


def build(cfg: DictConfig, kind: str, **options: Any) -> Data:
    """The data of a dense task; `kind` says which labels: semantic or instances, whose `masks` option is passed on.

    Raises DataError if the data cannot be used as requested, or has no such labels.
    """
    if cfg.data.source not in READERS:
        raise DataError(
            f"data={cfg.data.name} has one label per image, but task={cfg.task.name} needs dense labels: "
            f"expected data.source={' or '.join(READERS)}, as in data=scenes"
        )
    prep = preprocessing(cfg)
    splits = splits_of(cfg)
    with looking(cfg.data):
        found, names = READERS[cfg.data.source].load(cfg.data, splits, prep.size, kind)
    if kind == "semantic" and len(names) > IGNORE:
        raise DataError(f"data={cfg.data.name} has {len(names)} classes: a mask can have at most {IGNORE}")
    options |= {"classes": len(names), "normalize": Normalize(prep.mean, prep.std)}
    sources = {
        split: _source(cfg, records, split, kind, prep, options) for records, split in zip(found, splits, strict=True)
    }
    left_out = [_index(str(name), names) for name in cfg.data.left_out] if kind == "semantic" else []
    if len(set(left_out)) == len(names):
        raise DataError(
            f"data.left_out={list(cfg.data.left_out)} names every class of data={cfg.data.name}: there is nothing to "
            "evaluate. Leave one or more out of it"
        )
    return Data(
        train=sources.get("train"),
        val=sources["val"],
        num_classes=len(names),
        class_names=list(names),
        mean=prep.mean,
        std=prep.std,
        img_size=plain(prep.size),
        left_out=tuple(left_out),
    )


def _source(
    cfg: DictConfig, records: Any, split: str, kind: str, prep: Preprocessing, options: dict[str, Any]
) -> Dense:
    if not hasattr(records, kind):
        raise DataError(f"data={cfg.data.name} has no {kind} labels, which task={cfg.task.name} needs")
    if options.get("masks"):
        _check_masks(cfg, records, split)
    learns = split == "train"
    transform = paired.evaluation(cfg.data, cfg.task.get("scales"))  # detection has none
    if learns:
        transform = paired.training(cfg.data, cfg.task, prep.size, prep.mean, semantic=kind == "semantic")
    return KINDS[kind](records, transform, train=learns, **source_options(cfg, records, split), **options)


def _check_masks(cfg: DictConfig, records: Any, split: str) -> None:
    """Raise DataError if a split has boxes alone; an object without a mask among others is a bad image."""
    if not isinstance(records, coco.Coco) or records.has_masks():
        return
    head, others = f"task.head={cfg.task.head}", "task.head=faster_rcnn, retinanet or fcos"
    need, expected = f"which {head} learns", others
    if split == "val":
        need, expected = f"by which the masks of {head} are measured", f"another data.val_json=, or {others}"
    raise DataError(f"no object of {cfg.data[f'{split}_json']} has a segmentation, {need}: expected {expected}")


def _index(name: str, names: list[str]) -> int:
    if name not in names:
        raise DataError(f"data.left_out names {name!r}, which is not a class: expected some of {listed(names, 20)}")
    return names.index(name)


def _said(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, reversed(size)))
