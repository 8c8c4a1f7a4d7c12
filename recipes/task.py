"""The interface of a task: what training and evaluation need from it, and how it shows what it finds.

They never ask which task it is.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from omegaconf import DictConfig
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from recipes.config import ConfigError
from recipes.data import Data
from recipes.data.build import preprocessing
from zoo.errors import listed


class Metrics(Protocol):
    """Accumulates over an evaluation; every sample is counted once, whichever process sees it.

    `compute` returns the metrics over all processes and is called on all; a picture is drawn on one, afterwards.
    """

    def update(self, predictions: Any, targets: Any) -> None: ...

    def compute(self) -> dict[str, float]: ...


class Answers(ABC):
    """What an evaluation predicts for each image, to be written; each process has the images that it saw.

    An image that was replaced, as it could not be decoded, has no answer: what was predicted is of another image.
    """

    def note(self, predictions: Any, targets: Any) -> None:  # noqa: B027 (nothing to do where the metrics keep them)
        """The predictions and targets of the next batch, as the metrics take them."""

    @abstractmethod
    def files(self, data: Data, metrics: Metrics) -> dict[str, bytes]:
        """The contents of files by what their names end with; all processes must call this, after `metrics.compute`."""


class Task(ABC):
    """One kind of learning problem. A new task is one module in `recipes/tasks` with a subclass named `Task`."""

    score: ClassVar[str]  # the metric that decides which checkpoint is best; higher is better
    eval_batch_size: ClassVar[int] = 128  # images, where data.eval_batch_size is null

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    @abstractmethod
    def build_model(self, data: Data, *, pretrained: bool = True) -> nn.Module:
        """The model for this data; `pretrained=False` skips weights that a run's checkpoint will replace."""

    @abstractmethod
    def build_data(self) -> Data:
        """Training and validation sets."""

    def learner(self, model: nn.Module) -> nn.Module:
        """The module that a training step calls: the model, or a wrapper with attributes `model` and `beside`.

        `beside` holds further trainable parameters of the loss, such as the projection of feature distillation. It is
        neither evaluated nor exported; it is saved so that the run can resume.
        """
        return model

    def taught(self) -> int | None:
        """A checksum of the weights, other than the model's, that the loss depends on, once the model is built."""
        return None

    @abstractmethod
    def loss(self, model: nn.Module, images: Any, targets: Any, *, draw: int) -> Tensor:
        """Mean training loss of a micro-batch, `model` being the learner.

        `draw` numbers the micro-batches of the run and seeds what is random.
        """

    @abstractmethod
    def predict(self, model: nn.Module, images: Any) -> Any:
        """Predictions in evaluation mode, as the metrics take them."""

    def predict_with(self, model: nn.Module, images: Any, targets: Any) -> Any:
        """`predict` where targets are known: those of dense tasks say how large the image was, `size` (H, W)."""
        return self.predict(model, images)

    @abstractmethod
    def metrics(self, data: Data) -> Metrics:
        """Fresh metrics; `compute` includes `score`, and `loss` where predictions have one.

        A key with a slash, `iou/cat`, belongs to one class: it is logged but not printed after every evaluation.
        """

    @abstractmethod
    def picture(self, path: Path, data: Data, metrics: Metrics) -> None:
        """Draw what an evaluation found as a PNG."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """A user's image as a batch for `predict`."""

    @abstractmethod
    def answer(self, image: Image.Image, predictions: Any, data: Data, name: str) -> tuple[Table, Image.Image | None]:
        """What `predict` found in that image, as a table and, for dense tasks, drawn into the image."""

    def answers(self, data: Data) -> Answers:
        """Where the predictions of an evaluation are noted, to be saved. Raises ConfigError unless a task has them."""
        raise ConfigError(f"save_predictions=true: task={self.cfg.task.name} saves none: leave it out")

    def show(self, data: Data, metrics: Metrics) -> Image.Image | None:
        """Predictions beside the ground truth for a few validation images; None for classification."""
        return None

    def preparation(self) -> dict[str, Any]:
        """How an evaluation preprocesses images, for its record; `size` is data.img_size."""
        return vars(preprocessing(self.cfg)).copy()

    def classes(self, data: Data, metrics: Metrics) -> list[dict[str, Any]]:
        """The results of an evaluation per class, one row each, where that is meaningful."""
        return []

    def remarks(self, data: Data, metrics: Metrics) -> list[str]:
        """What makes the numbers of an evaluation doubtful, as messages."""
        return []


def check_takes(model: nn.Module, call: Callable[[], Any], said: Callable[[Exception], str]) -> None:
    """Raise ConfigError, with what is `said` of the error, if `call`, of the model on images, fails in evaluation mode:
    in training that would only be known at the first step or evaluation.
    """
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            call()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(said(error)) from error
    model.train(mode)


def some_of(names: Sequence[str], count: int) -> str:
    """`names` as text, out of `count` classes; the first of them are listed."""
    return f"{len(names)} of the {count} classes ({listed(names, 5)})"


def create(cfg: DictConfig) -> Task:
    """The task that `task.name` names."""
    return importlib.import_module(f"recipes.tasks.{cfg.task.name}").Task(cfg)
