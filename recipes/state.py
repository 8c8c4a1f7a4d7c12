"""Everything that changes while a model trains, to save and to restore as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from recipes import optim
from recipes.checkpoint import Checkpoint
from recipes.data import check_position
from recipes.hardware import Hardware
from recipes.log import Meter


@dataclass
class State:
    """Model, its moving average, optimiser, loss scaling and the sums of the log, after `step` optimiser steps."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter = field(default_factory=Meter)
    step: int = 0
    position: Callable[[int], dict[str, Any] | None] = lambda step: None  # of the training data after a step

    @classmethod
    def create(cls, cfg: DictConfig, model: nn.Module, hardware: Hardware) -> State:
        """The state before the first step."""
        return cls(model, make_ema(cfg, model), optim.create(cfg, model), hardware.scaler())

    @property
    def measured(self) -> nn.Module:
        """The module whose weights are evaluated: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def weights(self) -> str:
        """The name of the weights that are evaluated: `ema` or `model`."""
        return "model" if self.ema is None else "ema"

    def parts(self, *, optimizer: bool = True) -> dict[str, Any]:
        """State dicts by the name of the file they go into."""
        parts = {"model": self.model.state_dict()}
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        if optimizer:
            parts["optimizer"] = self.optimizer.state_dict()
        return parts

    def extras(self) -> dict[str, Any]:
        """What is no tensor: goes into state.json."""
        return {
            "weights": self.weights,
            "meter": self.meter.state(),
            "scaler": self.scaler.state_dict(),
            "data": self.position(self.step),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was written; what is loaded is copied into the tensors that are here.

        Raises DataError where the training data would go on in another order.
        """
        check_position(checkpoint.state.get("data"), self.position(checkpoint.state["step"]))
        self.model.load_state_dict(checkpoint.tensors("model"))
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.tensors("ema"))
        optim.load_state(self.optimizer, checkpoint.tree("optimizer"))
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.meter = Meter(**checkpoint.state["meter"])
        self.step = checkpoint.state["step"]

    def buffers(self) -> list[Tensor]:
        """A copy of the model's buffers: the statistics of norms, which a forward pass changes before any check."""
        return [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def restore_buffers(self, copies: list[Tensor]) -> None:
        for buffer, copy in zip(self.model.buffers(), copies, strict=True):
            buffer.copy_(copy)


def make_ema(cfg: DictConfig, model: nn.Module) -> ModelEmaV3 | None:
    """The moving average of the weights with decay `train.ema`, or None.

    The decay of step n is min(train.ema, (1 + n) / (10 + n)), TensorFlow's rule: short runs average over their last
    tenth, whatever the final decay.
    """
    if cfg.train.ema is None:
        return None
    return ModelEmaV3(model, decay=cfg.train.ema, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
