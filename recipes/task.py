"""What a task is: the six things that training and evaluation ask of it. They never ask which task it is."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

from omegaconf import DictConfig
from torch import Tensor, nn

from recipes.data import Data


class Metrics(Protocol):
    """Accumulates over an evaluation; every sample is counted once, whichever process sees it.

    `compute` gives the metrics of all processes and is called on all; a picture is drawn on one, afterwards.
    """

    def update(self, predictions: Any, targets: Any) -> None: ...

    def compute(self) -> dict[str, float]: ...


class Task(ABC):
    """One kind of learning problem. A new task is one module in `recipes/tasks` with a subclass named `Task`."""

    score: ClassVar[str]  # the metric that decides which checkpoint is best; higher is better

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    @abstractmethod
    def build_model(self, data: Data, *, pretrained: bool = True) -> nn.Module:
        """The model for this data; `pretrained=False` leaves out weights that a run checkpoint will replace."""

    @abstractmethod
    def build_data(self) -> Data:
        """Training and validation sets."""

    @abstractmethod
    def loss(self, model: nn.Module, images: Tensor, targets: Any, *, draw: int) -> Tensor:
        """Mean training loss of a micro-batch; `draw` numbers the micro-batches of the run and seeds what is random."""

    @abstractmethod
    def predict(self, model: nn.Module, images: Tensor) -> Any:
        """Predictions in evaluation mode, as the metrics take them."""

    @abstractmethod
    def metrics(self, data: Data) -> Metrics:
        """Fresh metrics; `compute` includes `loss` and `score`."""

    @abstractmethod
    def picture(self, path: Path, data: Data, metrics: Metrics) -> None:
        """Draw what an evaluation found as a PNG."""

    def classes(self, data: Data, metrics: Metrics) -> list[dict[str, Any]]:
        """What an evaluation found class by class, a row each, where that means something."""
        return []

    def remarks(self, data: Data, metrics: Metrics) -> list[str]:
        """What makes the numbers of an evaluation doubtful, in words."""
        return []


def create(cfg: DictConfig) -> Task:
    """The task that `task.name` names."""
    return importlib.import_module(f"recipes.tasks.{cfg.task.name}").Task(cfg)
