"""What a task is: the seven things that training and evaluation ask of it, and how it shows what it finds.

They never ask which task it is.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from omegaconf import DictConfig
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from recipes.data import Data
from recipes.data.build import preprocessing


class Metrics(Protocol):
    """Accumulates over an evaluation; every sample is counted once, whichever process sees it.

    `compute` gives the metrics of all processes and is called on all; a picture is drawn on one, afterwards.
    """

    def update(self, predictions: Any, targets: Any) -> None: ...

    def compute(self) -> dict[str, float]: ...


class Task(ABC):
    """One kind of learning problem. A new task is one module in `recipes/tasks` with a subclass named `Task`."""

    score: ClassVar[str]  # the metric that decides which checkpoint is best; higher is better
    eval_batch_size: ClassVar[int] = 128  # images, where data.eval_batch_size is null

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    @abstractmethod
    def build_model(self, data: Data, *, pretrained: bool = True) -> nn.Module:
        """The model for this data; `pretrained=False` leaves out weights that a run checkpoint will replace."""

    @abstractmethod
    def build_data(self) -> Data:
        """Training and validation sets."""

    def learner(self, model: nn.Module) -> nn.Module:
        """What a step calls and trains: the model, or a module of `model` and `beside`, what its loss learns with it.

        Of `beside` nothing is evaluated or exported; it is saved to go on with the run.
        """
        return model

    @abstractmethod
    def loss(self, model: nn.Module, images: Any, targets: Any, *, draw: int) -> Tensor:
        """Mean training loss of a micro-batch, `model` being the learner.

        `draw` numbers the micro-batches of the run and seeds what is random.
        """

    @abstractmethod
    def predict(self, model: nn.Module, images: Any) -> Any:
        """Predictions in evaluation mode, as the metrics take them."""

    def predict_with(self, model: nn.Module, images: Any, targets: Any) -> Any:
        """The same where the targets are there: of labels in an image they say how large it was, `size` (H, W)."""
        return self.predict(model, images)

    @abstractmethod
    def metrics(self, data: Data) -> Metrics:
        """Fresh metrics; `compute` includes `score`, and `loss` where predictions have one.

        A key with a stroke, `iou/cat`, is of one class: it is logged but not printed after every evaluation.
        """

    @abstractmethod
    def picture(self, path: Path, data: Data, metrics: Metrics) -> None:
        """Draw what an evaluation found as a PNG."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """A person's own image as a batch that `predict` takes."""

    @abstractmethod
    def answer(self, image: Image.Image, predictions: Any, data: Data, name: str) -> tuple[Table, Image.Image | None]:
        """What `predict` found in that image, in words and, where labels lie in the image, drawn into it."""

    def show(self, data: Data, metrics: Metrics) -> Image.Image | None:
        """What was found in a few images of an evaluation, beside what is true; None where labels lie in no place."""
        return None

    def preparation(self) -> dict[str, Any]:
        """How images reach the model in an evaluation, for the record of it; `size` is data.img_size."""
        return vars(preprocessing(self.cfg)).copy()

    def classes(self, data: Data, metrics: Metrics) -> list[dict[str, Any]]:
        """What an evaluation found class by class, a row each, where that means something."""
        return []

    def remarks(self, data: Data, metrics: Metrics) -> list[str]:
        """What makes the numbers of an evaluation doubtful, in words."""
        return []


def some_of(names: Sequence[str], count: int) -> str:
    """Some of `count` classes in words, the first of them by name."""
    return f"{len(names)} of the {count} classes ({', '.join(names[:5])}{', ...' if names[5:] else ''})"


def create(cfg: DictConfig) -> Task:
    """The task that `task.name` names."""
    return importlib.import_module(f"recipes.tasks.{cfg.task.name}").Task(cfg)
