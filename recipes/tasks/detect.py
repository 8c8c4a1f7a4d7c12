"""Object detection and instance segmentation: boxes, and masks, of objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from recipes import models, task
from recipes.answers import Objects
from recipes.config import ConfigError
from recipes.data import Data, dense
from recipes.metrics.detection import Detection, at_size, boxes_at, pycocotools
from recipes.pictures import beside, fitted, readable, with_objects
from recipes.plots import draw_found
from recipes.tasks.segment import check_size, prepared, resized
from zoo.heads import detector

WITH_MASKS = ("mask_rcnn", "cascade_mask_rcnn")
SURE = 0.5  # the score from which an object is shown to the user


class Task(task.Task):
    """A detector of zoo.heads on any backbone; its losses are summed."""

    score = "box_ap"
    eval_batch_size = 1  # images keep their own sizes

    @property
    def masks(self) -> bool:
        return self.cfg.task.head in WITH_MASKS

    def build_data(self) -> Data:
        pycocotools()  # if it is missing, not only after an epoch
        return dense.build(self.cfg, "instances", masks=self.masks)

    def build_model(self, data: Data, *, pretrained: bool = True) -> nn.Module:
        models.check_classes(self.cfg, data)
        if "train" in self.cfg and self.cfg.train.get("eval_mode"):
            raise ConfigError(
                "train.eval_mode=true: a detector only gives losses in training mode. task.norm_eval=true freezes the "
                "statistics of its backbone's batch norms"
            )
        head = {key: self.cfg.task[key] for key in ("head", "channels", "norm_eval")}
        model = models.create(self.cfg, data, pretrained=pretrained, make=detector, **head)
        check_size(self, model, data)
        return model

    def loss(self, model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]], *, draw: int) -> Tensor:
        return sum(model(images, targets).values())

    def predict(self, model: nn.Module, images: list[Tensor]) -> list[dict[str, Any]]:
        """Boxes, labels, scores and perhaps masks in the boxes of each image, at the `size` of what the model sees.

        Images of different sizes are not batched: padding would change the results.
        """
        alike: dict[Any, list[int]] = {}
        for index, image in enumerate(images):
            alike.setdefault(image.shape, []).append(index)
        found: dict[int, dict[str, Any]] = {}
        for indices in alike.values():
            found |= zip(indices, model([images[index] for index in indices], paste_masks=False), strict=True)
        return [{**found[index], "size": image.shape[1:]} for index, image in enumerate(images)]

    def metrics(self, data: Data) -> Detection:
        return Detection(data.class_names, self.masks)

    def picture(self, path: Path, data: Data, metrics: Detection) -> None:
        values = metrics.values
        each = {key.removeprefix("box_ap/"): value for key, value in values.items() if key.startswith("box_ap/")}
        draw_found(path, self.show(data, metrics), each, f"box AP, mean {values['box_ap']:.2f} %")

    def classes(self, data: Data, metrics: Detection) -> list[dict[str, Any]]:
        keys = ["box_ap", *(["mask_ap"] if self.masks else [])]
        return [
            {"class": name, **{key: metrics.values.get(f"{key}/{name}", "") for key in keys}}
            for name in data.class_names
        ]

    def remarks(self, data: Data, metrics: Detection) -> list[str]:
        absent = [name for name in data.class_names if f"box_ap/{name}" not in metrics.values]
        if not absent:
            return []
        said = task.some_of(absent, data.num_classes)
        return [f"{said} have no object in the validation set: whether the model finds them is not evaluated"]

    def show(self, data: Data, metrics: Detection) -> Image.Image | None:
        pairs, shown = [], set()
        for found, target in metrics.shown:
            image = fitted(data.val.image(target["shown"]))
            both = [at_size(objects, image.size[::-1]) for objects in (target, sure(found))]
            pairs.append([with_objects(image, objects, data.class_names) for objects in both])
            shown |= {label for objects in both for label in objects["labels"].tolist()}
        return beside(pairs, data.class_names, shown) if pairs else None

    def preparation(self) -> dict[str, Any]:
        return resized(self.cfg)

    def answers(self, data: Data) -> Objects:
        return Objects()

    def prepare(self, image: Image.Image) -> list[Tensor]:
        return [prepared(self.cfg, image)]

    def answer(self, image: Image.Image, predictions: list[Any], data: Data, name: str) -> tuple[Table, Image.Image]:
        """The objects that are more likely there than not, and the image with them."""
        found, table, picture = sure(predictions[0]), Table("class", "score", "x, y, x, y", title=name), readable(image)
        boxes = boxes_at(found, image.size[::-1]).tolist()
        for label, score, box in zip(found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True):
            table.add_row(data.class_names[label], f"{100 * score:.1f} %", ", ".join(f"{edge:.0f}" for edge in box))
        if not table.rows:
            scores = predictions[0]["scores"]
            best = f"; the highest score is {100 * scores.max():.1f} %" if len(scores) else ""
            table.caption = f"nothing scores {100 * SURE:.0f} % or more{best}"
        return table, with_objects(picture, at_size(found, picture.size[::-1]), data.class_names)


def sure(found: dict[str, Any]) -> dict[str, Any]:
    """The objects that are more likely there than not."""
    kept = found["scores"] >= SURE
    return {key: value[kept] if isinstance(value, Tensor) else value for key, value in found.items()}
