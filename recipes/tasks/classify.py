"""Image classification: one label per image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from rich.table import Table
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from recipes import data, distill, models, task, weights
from recipes.answers import MostLikely
from recipes.config import ConfigError
from recipes.config.idle import check_smoothing
from recipes.data.build import preprocessing
from recipes.data.transforms import eval_transform
from recipes.metrics.classification import MOST, Metrics, RealMetrics, among, likeliest
from recipes.plots import draw_confusion
from zoo import Backbone
from zoo.errors import first_line

BOLD = 0.3  # mean probability of the most likely class above which a model counts as confident


class Task(task.Task):
    """Classification with (binary) cross entropy, label smoothing, Mixup, CutMix and, if one is given, a teacher."""

    score = "top1"

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.teacher: distill.Distillation | None = None

    def build_data(self) -> data.Data:
        built = with_classes(data.build(self.cfg), self.cfg.model.num_classes)
        if len(built.class_names) < 2:
            raise data.DataError(
                f"data={self.cfg.data.name} has only one class, {built.class_names[0]}: there is nothing to learn. "
                "Give data with two or more classes; a folder of images needs a subfolder for each class"
            )
        if "augment" in self.cfg:  # an evaluation has none
            check_smoothing(self.cfg, built.num_classes)
            self.mix = data.Mix(self.cfg.augment, built.num_classes)
        return built

    def build_model(self, data: data.Data, *, pretrained: bool = True) -> nn.Module:
        with weights.at_a_size(self.cfg):
            model = models.create(self.cfg, data, pretrained=pretrained)
        self._check_sizes(model)
        if "augment" in self.cfg:
            self.teacher = distill.create(self.cfg, data, model)
        return model

    def _check_sizes(self, model: nn.Module) -> None:
        """Check that the model takes images of the sizes that it will see, before anything is trained or evaluated."""
        name, other = self.cfg.model.name, ", or leave out model.img_size=" if self.cfg.model.img_size else ""
        size, learned = preprocessing(self.cfg).size, preprocessing(self.cfg, train=True).size
        if not isinstance(model, Backbone) and ("augment" in self.cfg or size == learned):
            task.check_takes(
                model,
                lambda: model(torch.zeros(1, 3, *learned)),
                lambda error: (
                    f"model.name={name} does not take images of {learned[0]} x {learned[1]} pixels "
                    f"({first_line(error)}): set data.img_size= to a size that it takes{other}"
                ),
            )
        if size != learned:
            task.check_takes(
                model,
                lambda: model(torch.zeros(1, 3, *size)),
                lambda error: (
                    f"data.eval_img_size={self.cfg.data.eval_img_size}: {name} only takes images of the size that it "
                    f"is built for ({error}): set data.eval_img_size=null, or, for timm's ViTs, "
                    "+model.dynamic_img_size=true"
                ),
            )

    def learner(self, model: nn.Module) -> nn.Module:
        return model if self.teacher is None else self.teacher.learner(model)

    def taught(self) -> int | None:
        return None if self.teacher is None else self.teacher.teacher.checksum()

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, *, draw: int) -> Tensor:
        images, targets = self.mix(images, targets, seed=self.cfg.seed, step=draw)  # targets: (B, classes)
        own, outputs = partial(self.criterion, targets=targets), model(images)
        return own(outputs) if self.teacher is None else self.teacher(outputs, images, own)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`task.loss` of logits and targets, both (B, classes)."""
        if self.cfg.task.loss == "cross_entropy":
            return F.cross_entropy(logits, targets)
        return BinaryCrossEntropy(target_threshold=self.cfg.task.target_threshold)(logits.float(), targets)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images)  # (B, classes)

    def metrics(self, data: data.Data) -> Metrics | RealMetrics:
        if data.truths is not None:
            return RealMetrics(torch.from_numpy(data.truths), data.subset)
        return Metrics(len(data.class_names), data.subset)

    def answers(self, data: data.Data) -> MostLikely:
        return MostLikely(data.subset)

    def prepare(self, image: Image.Image) -> Tensor:
        return eval_transform(**vars(preprocessing(self.cfg)))(image)[None]  # (1, 3, H, W)

    def answer(self, image: Image.Image, predictions: Tensor, data: data.Data, name: str) -> tuple[Table, None]:
        """The five most likely classes."""
        logits = among(predictions.float(), data.subset)
        (shares,), (best,) = logits.softmax(-1), likeliest(logits, 5)
        table = Table("class", "probability", title=name)
        for index in best.tolist():
            table.add_row(data.class_names[index], f"{100 * shares[index]:.2f} %")
        return table, None

    def picture(self, path: Path, data: data.Data, metrics: Metrics | RealMetrics) -> None:
        if metrics.confusion is not None:
            draw_confusion(path, metrics.confusion.compute(), data.class_names)

    def classes(self, data: data.Data, metrics: Metrics | RealMetrics) -> list[dict[str, Any]]:
        if metrics.confusion is None:
            return []
        counts = metrics.confusion.compute()
        return [_class(index, name, counts, data) for index, name in enumerate(data.class_names)]

    def remarks(self, data: data.Data, metrics: Metrics | RealMetrics) -> list[str]:
        if data.truths is not None:
            return []
        if metrics.confusion is None:
            return [
                f"there is no confusion matrix of {len(data.class_names)} classes, only of up to {MOST}: no picture "
                "and no table of classes is written, and the order of the classes is not checked"
            ]
        counts, confidence = metrics.confusion.compute().double(), metrics.confidence.compute().item()
        images, classes = counts.sum().item(), len(counts)
        right = counts.diagonal().sum().item() / images
        absent = int((counts.sum(1) == 0).sum())
        remarks = [f"{absent} of the {classes} classes have no image"] if absent else []
        # with few classes, twice the accuracy of chance is a lot
        if images < 50 or confidence < max(BOLD, 3 / classes) or right > min(2 / classes, 1 / classes + 0.1):
            return remarks
        best = _renamed(counts)
        if best is not None and best <= 2 * right:  # no order would help: it predicts a few classes for all images
            return remarks
        more = best is not None and best > 5 * right
        return [
            *remarks,
            f"the model is confident (its most likely class has {100 * confidence:.0f} % on average) but only as "
            f"accurate as chance ({100 * right:.2f} %): its classes and the labels are probably in different orders"
            + (f"; with a one-to-one renaming of the classes, {100 * best:.1f} % would be correct" if more else ""),
        ]


def with_classes(built: data.Data, count: int | None) -> data.Data:
    """The data for a model of `count` classes (None: as in the data); classes without images are named by number.

    Raises ConfigError if the data has more.
    """
    if count is None or count == built.num_classes:
        return built
    if count < built.num_classes:
        raise ConfigError(
            f"model.num_classes={count} is less than the {built.num_classes} classes of the data: leave it out"
        )
    more = [] if built.subset is not None else list(map(str, range(built.num_classes, count)))
    return replace(built, num_classes=count, class_names=[*built.class_names, *more])


def _class(index: int, name: str, counts: Tensor, data: data.Data) -> dict[str, Any]:
    """A row of the table of classes: how many images, how many correct, and the most frequent mistake."""
    row = counts[index].clone()
    images, right = int(row.sum()), int(row[index])
    row[index] = 0
    taken, most = int(row.argmax()), int(row.max())
    return {
        "class": index if data.subset is None else data.subset[index],
        "name": name,
        "images": images,
        "top1": round(100 * right / images, 2) if images else "",
        "mistaken_for": data.class_names[taken] if most else "",
        "times": most,
    }


def _renamed(counts: Tensor) -> float | None:
    """The accuracy with the best one-to-one renaming of classes; None if there are too few images to tell."""
    from scipy.optimize import linear_sum_assignment

    images, classes = counts.sum().item(), len(counts)
    if images < 5 * classes:
        return None
    return counts[linear_sum_assignment(counts.numpy(), maximize=True)].sum().item() / images
