"""Semantic segmentation: one label per pixel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

import zoo
from recipes import distributed, models, plan, task
from recipes.answers import LabelMaps
from recipes.config import ConfigError
from recipes.config.idle import SIDES
from recipes.data import BadImage, Data, dense
from recipes.data.build import preprocessing
from recipes.data.masks import values_of
from recipes.data.paired import IGNORE, antialiased, evaluation, mapped
from recipes.data.transforms import Normalize
from recipes.metrics.segmentation import Segmentation, at_size
from recipes.pictures import beside, colours, with_labels
from recipes.plots import draw_found
from zoo.heads import inference, segmenter
from zoo.heads.segmenter import LEAST

Looks = Tensor | list[Tensor]  # an image (3, h, w), or the same at each of task.scales

HEAD = ("head", "channels", "auxiliary", "dropout")  # keys of cfg.task that the model is built with
# arguments with which timm's models take images of other sizes than the one that they are built for
ANY_SIZE = ({"strict_img_size": "false"}, {"dynamic_img_size": "true"})


class Task(task.Task):
    """A segmentation head of zoo.heads on any backbone; the losses of both heads are summed."""

    score = "miou"
    eval_batch_size = 1  # images keep their own sizes

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.labelled: Tensor | None = None  # whether any training pixel so far had a label

    def build_data(self) -> Data:
        return dense.build(self.cfg, "semantic")

    def build_model(self, data: Data, *, pretrained: bool = True) -> nn.Module:
        models.check_classes(self.cfg, data)
        self.check_windows()
        self.check_parts(data)
        head = {key: self.cfg.task[key] for key in HEAD}
        loss = {"ignore_index": IGNORE, "class_weights": class_weights(self.cfg, data)}
        model = models.create(self.cfg, data, pretrained=pretrained, make=segmenter, **head, **loss)
        check_size(self, model, data)
        return model

    def check_windows(self) -> None:
        """Raise ConfigError for scales and windows with which no image can be evaluated."""
        scales, stride, crop = list(self.cfg.task.scales), self.cfg.task.stride, preprocessing(self.cfg).size
        if not scales or min(scales) <= 0:
            raise ConfigError(f"task.scales={scales}: expected scales of the image above 0, such as [1.0]")
        fits = stride is None or (len(stride) == 2 and all(0 < s <= c for s, c in zip(stride, crop, strict=True)))
        if self.cfg.task.inference == "slide" and not fits:
            raise ConfigError(f"task.stride={list(stride)}: expected two numbers from 1 to the window's {list(crop)}")

    def check_parts(self, data: Data) -> None:
        """Raise ConfigError for parts of one image if a batch norm has a 1 x 1 map, which has no variance then: that of
        UPerNet's pooling, or, for small crops, that of any head on the coarsest map.
        """
        head, small = self.cfg.task.head, self.cfg.task.crop and max(preprocessing(self.cfg).size) <= LEAST
        if not (head == "upernet" or small) or data.train is None or self.cfg.train.get("eval_mode"):
            return
        together = self.cfg.hardware.sync_bn and distributed.size() > 1
        if plan.make(self.cfg, data.train).micro == 1 and not together:
            larger = f"data.img_size={2 * LEAST} or more" if small else ""
            other = "task.head=semantic_fpn" if head == "upernet" else ""
            raise ConfigError(
                f"task.head={head} cannot train on one image at a time{' of this size' * small}, as it has a batch "
                f"norm on a 1 x 1 map: {plan.LARGER_MICRO_BATCHES} {' with '.join(filter(None, (other, larger)))}"
            )

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, *, draw: int) -> Tensor:
        labelled = (targets != IGNORE).any()  # targets: (B, H, W)
        self.labelled = labelled if self.labelled is None else self.labelled | labelled
        return sum(model(images, targets).values())

    @property
    def averages(self) -> bool:
        """Whether predictions are averaged over several views of an image."""
        return list(self.cfg.task.scales) != [1.0] or self.cfg.task.flip

    def predict(self, model: nn.Module, images: list[Looks]) -> list[Tensor]:
        """Logits (classes, h, w) of each image, at the size of what the model sees; for a list, at the largest.

        If several scales are asked for and an image is one tensor, they are resized from it.
        """
        return self._found(model, images, [_seen(image) for image in images])

    def predict_with(self, model: nn.Module, images: list[Looks], targets: list[dict[str, Any]]) -> list[Tensor]:
        """As `predict`; with several scales, or flipped, at the images' own sizes.

        Class probabilities are resized to those and averaged; their logarithms are returned.
        """
        if not self.averages:
            return self.predict(model, images)
        return self._found(model, images, [tuple(target["size"]) for target in targets])

    def _found(self, model: nn.Module, images: list[Looks], sizes: list[tuple[int, ...]]) -> list[Tensor]:
        kinds = [(mapped(_seen, image), size) for image, size in zip(images, sizes, strict=True)]
        if all(kind == kinds[0] for kind in kinds):
            return list(self._logits(model, _stacked(images), sizes[0]))
        return [self._logits(model, _stacked([image]), size)[0] for image, size in zip(images, sizes, strict=True)]

    def _logits(self, model: nn.Module, images: Tensor | Iterator[Tensor], size: tuple[int, ...]) -> Tensor:
        cfg = self.cfg.task
        run = inference.whole
        if cfg.inference == "slide":
            crop = preprocessing(self.cfg).size
            stride = tuple(cfg.stride or (max(1, side * 2 // 3) for side in crop))
            run = partial(inference.slide, crop=crop, stride=stride)
        if not self.averages:
            return run(model, images)
        looks = inference.scaled(images, list(cfg.scales)) if isinstance(images, Tensor) else images
        shares = inference.averaged(model, looks, size, cfg.flip, run)
        return shares.clamp_min_(torch.finfo(shares.dtype).tiny).log_()  # as logits, for the loss

    def metrics(self, data: Data) -> Segmentation:
        if self.labelled is not None:  # all processes evaluate, but only one is asked for remarks
            self.labelled.fill_(distributed.highest(int(self.labelled)))
        return Segmentation(data.class_names, data.left_out)

    def picture(self, path: Path, data: Data, metrics: Segmentation) -> None:
        values = metrics.compute()
        apart = {data.class_names[index] for index in data.left_out}
        each = {key.removeprefix("iou/"): value for key, value in values.items() if key.startswith("iou/")}
        each = {f"{name} (not in the mean)" if name in apart else name: value for name, value in each.items()}
        draw_found(path, self.show(data, metrics), each, f"IoU, mean {values['miou']:.2f} %")

    def classes(self, data: Data, metrics: Segmentation) -> list[dict[str, Any]]:
        values, counts = metrics.compute(), metrics.confusion.compute()
        return [
            {
                "class": name,
                "pixels": int(counts[index].sum()),
                "right": int(counts[index, index]),
                "iou": values.get(f"iou/{name}", ""),
                "in_mean": index not in data.left_out,
            }
            for index, name in enumerate(data.class_names)
        ]

    def remarks(self, data: Data, metrics: Segmentation) -> list[str]:
        true, remarks = metrics.confusion.compute().sum(1), []
        absent = [name for index, name in enumerate(data.class_names) if not true[index]]
        if self.labelled is not None and not self.labelled:
            remarks.append(f"no pixel of the training images so far is labelled, all are {IGNORE}: nothing is learned")
        if absent:
            remarks.append(
                f"{task.some_of(absent, data.num_classes)} have no pixel in the validation set: whether the model "
                f"finds them is not evaluated. {IGNORE} in a mask means unlabelled, unless data.label_ids names it, as "
                f"[0,{IGNORE}] does"
            )
        return remarks

    def show(self, data: Data, metrics: Segmentation) -> Image.Image | None:
        pairs, shown = [], set()
        for found, target in metrics.shown:
            image, true = data.val.image(target["shown"]), target["labels"]
            pairs.append([with_labels(image, labels, data.num_classes, bare=data.left_out) for labels in (true, found)])
            shown |= {*true.unique().tolist(), *found.unique().tolist()}
        return beside(pairs, data.class_names, shown - {IGNORE, *data.left_out}) if pairs else None

    def preparation(self) -> dict[str, Any]:
        return resized(self.cfg) | {
            key: OmegaConf.to_object(self.cfg.task)[key] for key in ("inference", "stride", "scales", "flip")
        }

    def answers(self, data: Data) -> LabelMaps:
        return LabelMaps(values_of(data.val.records))

    def prepare(self, image: Image.Image) -> list[Tensor]:
        return [prepared(self.cfg, image)]

    def answer(self, image: Image.Image, predictions: list[Tensor], data: Data, name: str) -> tuple[Table, Image.Image]:
        """The share of pixels of each class, in its colour in the picture, and the image tinted by classes."""
        labels = at_size(predictions[0].float(), image.size[::-1]).argmax(0).cpu()
        shares = labels.flatten().bincount(minlength=data.num_classes) / labels.numel()
        table = Table("class", "pixels", title=name)
        tints = [f"rgb({red},{green},{blue})" for red, green, blue in colours(data.num_classes)]
        for index in shares.argsort(descending=True).tolist():
            if shares[index]:
                tint = None if index in data.left_out else tints[index]
                table.add_row(data.class_names[index], f"{100 * shares[index]:.2f} %", style=tint)
        return table, with_labels(image, labels, data.num_classes, bare=data.left_out)


def class_weights(cfg, data: Data) -> list[float] | None:
    """The weight of each class in the loss; None: all the same."""
    weight = cfg.task.left_out_weight
    if weight == 1 or not data.left_out:
        return None
    if not 0 < weight < math.inf:
        raise ConfigError(
            f"task.left_out_weight={weight}: expected a number above 0, such as 0.1. Pixels that are not to be learned "
            f"at all are {IGNORE} in a mask"
        )
    return [weight if index in data.left_out else 1.0 for index in range(data.num_classes)]


def check_size(owner: task.Task, model: nn.Module, data: Data) -> None:
    """Check that a model that timm builds for images of one size takes those of the evaluation, of which it sees one.

    Raises ConfigError with the arguments that let it take others.
    """
    if "img_size" not in model.created_with or isinstance(getattr(model.backbone, "model", None), zoo.Backbone):
        return
    source = data.val
    if source is None:  # where a run only predicts
        return
    try:
        image = source.image(0)
    except BadImage:  # which the evaluation names, or replaces
        return

    def said(error: Exception) -> str:
        cfg = owner.cfg
        name = cfg.model.name
        taken = inspect.signature(type(timm.create_model(name))).parameters  # of the model without a head
        ways = next((ways for ways in ANY_SIZE if ways.keys() <= taken.keys()), {})
        more = (f"+model.{key}={value}" for key, value in ways.items() if cfg.model.get(key) is None)
        given = " ".join(more) or "another model"
        window = ", or, for images of at least this size, task.inference=slide" if cfg.task.name == "segment" else ""
        return (
            f"{name}, built for images of {model.created_with['img_size']} pixels, does not take those of the "
            f"evaluation, such as {source.where(0)} ({error}): give {given}{window}"
        )

    task.check_takes(model, lambda: owner.predict(model, owner.prepare(image)), said)


def resized(cfg) -> dict[str, Any]:
    """The preprocessing of an evaluation, for its record; `size` is that of crops and windows."""
    prep, sides = preprocessing(cfg), {key: cfg.data[key] for key in SIDES}
    sides["antialias"] = antialiased(cfg.data)
    return {"size": prep.size, "mean": prep.mean, "std": prep.std, "interpolation": "bilinear"} | {
        key: list(value) if isinstance(value, Sequence) else value for key, value in sides.items()
    }


def prepared(cfg, image: Image.Image) -> Looks:
    """(3, h, w) float32: an image as an evaluation takes it; a list if it has other scales than 1."""
    prep = preprocessing(cfg)
    normalize = Normalize(prep.mean, prep.std)
    planes = evaluation(cfg.data, cfg.task.get("scales"))(tv_tensors.Image(F.pil_to_tensor(image)))
    return mapped(lambda part: normalize.finish(part.as_subclass(Tensor)), planes)


def _seen(image: Looks) -> tuple[int, ...]:
    """(h, w) of an image, or of the largest of a list."""
    return tuple(image.shape[1:]) if isinstance(image, Tensor) else max(map(_seen, image))


def _stacked(images: list[Looks]) -> Tensor | Iterator[Tensor]:
    """Images of one size as a batch (B, 3, h, w); for lists one batch per scale, one after the other."""
    if isinstance(images[0], Tensor):
        return torch.stack(images)
    return (torch.stack(looks) for looks in zip(*images, strict=True))
