"""Everything that changes while a model trains, to save and to restore as one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from recipes import optim
from recipes.checkpoint import Checkpoint
from recipes.hardware import Hardware
from recipes.log import Meter


@dataclass
class State:
    """Model, its moving average, optimiser, loss scaling and the sums of the log, after `step` optimiser steps.

    skipped  how many of the last steps in a row had a gradient that is no number, and changed nothing
    due      the weights of this step are still to be evaluated
    best     the best score so far
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter = field(default_factory=Meter)
    step: int = 0
    skipped: int = 0
    due: bool = False
    best: float | None = None
    _before: list[Tensor] = field(default_factory=list)
    _begun: bool = False

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
        state = {"weights": self.weights, "meter": self.meter.state(), "scaler": self.scaler.state_dict()}
        return {**state, "skipped": self.skipped}

    def load(self, checkpoint: Checkpoint, best: float | None) -> None:
        """Go back to where a checkpoint was written; what is loaded is copied into the tensors that are here.

        best  the score of the best checkpoint, which is another one
        """
        self.model.load_state_dict(checkpoint.tensors("model"))
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.tensors("ema"))
        optim.load_state(self.optimizer, checkpoint.tree("optimizer"))
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.meter = Meter(**checkpoint.state["meter"])
        self.step = checkpoint.state["step"]
        self.skipped = checkpoint.state.get("skipped", 0)  # not in checkpoints of the first version
        self.best = best

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the model's buffers: the statistics of norms, which a forward pass changes before any check."""
        buffers = list(self.model.buffers())
        if not self._before:
            self._before = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._before, buffers)  # hundreds of small tensors at once
        self._begun = True

    @torch.no_grad()
    def rewind(self) -> None:
        """Undo what a step that was begun and not done has changed."""
        if self._begun:
            for buffer, copy in zip(self.model.buffers(), self._before, strict=True):
                buffer.copy_(copy)

    def done(self) -> None:
        """Count the step that was begun."""
        self.step, self._begun = self.step + 1, False


def make_ema(cfg: DictConfig, model: nn.Module) -> ModelEmaV3 | None:
    """The moving average of the weights with decay `train.ema`, or None.

    The decay of step n is min(train.ema, (1 + n) / (10 + n)), TensorFlow's rule: short runs average over their last
    tenth, whatever the final decay.
    """
    if cfg.train.ema is None:
        return None
    return ModelEmaV3(model, decay=cfg.train.ema, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
