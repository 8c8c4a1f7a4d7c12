"""Everything that changes while a model trains, to be saved and restored together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from recipes import distributed, models, optim, sharding
from recipes.checkpoint import SHARDED, Checkpoint
from recipes.config import ConfigError
from recipes.console import say
from recipes.data import Source, check_position
from recipes.freeze import freeze
from recipes.hardware import Hardware
from recipes.log import Meter
from recipes.plan import Plan, stream_state
from recipes.settings import TWICE
from recipes.statistics import Statistics

HALVINGS = 32  # of the loss scale in a row, from its initial value, 2**16: below that no gradient overflows float16

MakeLearner = Callable[[nn.Module], nn.Module]


@dataclass
class State:
    """Model, its moving average, optimiser, loss scaling and the sums of the log, after `step` optimiser steps.

    source       of the training images
    learner      what is called and trained: the model, or a module of `model` and `beside`, which the loss trains too
    frozen       modules of the model that stay in evaluation mode: all of it with `train.eval_mode`
    ema_updates  how often the moving average was updated, every `train.ema_every` steps
    skipped      how many of the last steps in a row had a gradient that is not finite, and changed nothing
    overflowed   how many of these did because float16 overflowed
    due          the weights of this step are still to be evaluated
    best         the best score so far
    """

    cfg: DictConfig
    plan: Plan
    source: Source
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    statistics: Statistics
    learner: nn.Module
    frozen: list[nn.Module]
    ema_updates: int = 0
    meter: Meter = field(default_factory=Meter)
    step: int = 0
    skipped: int = 0
    overflowed: int = 0
    due: bool = False
    best: float | None = None
    _before: list[Tensor] = field(default_factory=list)
    _begun: bool = False

    @classmethod
    def create(
        cls,
        cfg: DictConfig,
        model: nn.Module,
        hardware: Hardware,
        plan: Plan,
        source: Source,
        make_learner: MakeLearner,
    ) -> State:
        """The state before the first step; with hardware.parallel=fsdp the model is sharded here.

        make_learner  called with the model, returns what is to be trained, see recipes.task

        Raises ConfigError for what cannot be frozen, sharded or computed again.
        """
        model = hardware.synced(model)
        if cfg.train.grad_checkpointing:
            models.checkpoint_gradients(model, cfg.model.name)
        frozen = [*freeze(model, cfg.train.freeze), *([model] if cfg.train.eval_mode else [])]
        learner = hardware.place(make_learner(model))
        if learner is not model and hardware.parallel == "fsdp":
            raise ConfigError(
                "hardware.parallel=fsdp shards the model, but not what its loss trains beside it "
                "(teacher.kind=feature): set hardware.parallel=ddp"
            )
        ema = make_ema(cfg, model, foreach=hardware.parallel != "fsdp")
        hardware.shard(model)
        if ema is not None:
            hardware.shard(ema.module)
        optimizer = optim.create(cfg, model, None if learner is model else learner.beside)
        train_mode(learner, frozen)
        if cfg.train.grad_checkpointing and models.records_twice(model):
            say(f"train.grad_checkpointing=true: {TWICE}")
        return cls(
            cfg=cfg,
            plan=plan,
            source=source,
            model=model,
            ema=ema,
            optimizer=optimizer,
            scaler=hardware.scaler(),
            statistics=Statistics(model, plan),
            learner=learner,
            frozen=frozen,
        )

    @property
    def evaluated_model(self) -> nn.Module:
        """The module whose weights are evaluated."""
        return self.models[self.weights]

    @property
    def weights(self) -> str:
        """The name of the weights that are evaluated: `ema`, once it was updated, or `model`."""
        return "ema" if self.ema is not None and self.ema_updates and self.cfg.train.ema_evaluated else "model"

    @property
    def beside(self) -> nn.Module | None:
        """What is trained beside the model."""
        return None if self.learner is self.model else self.learner.beside

    @property
    def overflows(self) -> bool:
        """Whether too large a loss scale may be why a gradient is not finite, as in the first steps in float16."""
        least = 2.0 ** (16 - HALVINGS)
        return self.scaler.is_enabled() and self.overflowed < HALVINGS and self.scaler.get_scale() > least

    def train(self) -> None:
        """Training mode."""
        train_mode(self.learner, self.frozen)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The model and its moving average by name."""
        return {"model": self.model} if self.ema is None else {"model": self.model, "ema": self.ema.module}

    def state_dicts(self, *, optimizer: bool) -> dict[str, Any]:
        """State dicts by the name of their file; a sharded state with its optimiser stays sharded."""
        if sharding.is_sharded(self.model):
            if optimizer:  # without state until the first step that is not skipped
                return {SHARDED: sharding.tree(self.models, self.optimizer if self.optimizer.state else None)}
            return {name: sharding.gathered(model) for name, model in self.models.items()}
        found = {name: model.state_dict() for name, model in self.models.items()}
        if optimizer:
            found["optimizer"] = self.optimizer.state_dict()
            found |= {} if self.beside is None else {"beside": self.beside.state_dict()}
        return found

    def extras(self) -> dict[str, Any]:
        """Everything that is not a tensor, for state.json; what the readers hold only on rank 0, which writes it."""
        state = {"weights": self.weights, "meter": self.meter.state(), "scaler": self.scaler.state_dict()}
        counts = {"skipped": self.skipped, "overflowed": self.overflowed, "averages": self.ema_updates}
        data = self._stream_state(self.step, readers=distributed.rank() == 0)
        return {**state, **counts, "parts": self.plan.micro_batches, "data": data}

    def _stream_state(self, step: int, *, readers: bool) -> dict[str, Any] | None:
        return stream_state(self.cfg, self.plan, self.source, step, readers=readers)

    def load(self, checkpoint: Checkpoint, best: float | None) -> None:
        """Restore the state of a checkpoint, by copying it into the existing tensors.

        best  the score of the best checkpoint, which is a separate one

        Raises DataError if the training data would continue in another order.
        """
        check_position(checkpoint.state.get("data"), self._stream_state(checkpoint.state["step"], readers=False))
        self._load_tensors(checkpoint)
        if checkpoint.state["scaler"]:  # empty if the loss was not scaled so far, as in bfloat16
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.meter = Meter(**checkpoint.state["meter"])
        self.step = checkpoint.state["step"]
        self.skipped = checkpoint.state.get("skipped", 0)  # older checkpoints lack it
        self.overflowed = checkpoint.state.get("overflowed", 0)  # and some, later ones, lack only this
        older = self.step // self.cfg.train.ema_every  # what older ones would have counted
        self.ema_updates = checkpoint.state.get("averages", older)
        self.best = best

    def _load_tensors(self, checkpoint: Checkpoint) -> None:
        if checkpoint.sharded:
            states = sharding.tree(self.models, self.optimizer if checkpoint.has("optimizer") else None)
            checkpoint.fill(states)
            sharding.load_tree(states, self.models, self.optimizer)
            return
        for name, model in self.models.items():
            sharding.load_whole(model, checkpoint.tensors(name))
        if self.beside is not None:
            self.beside.load_state_dict(checkpoint.tensors("beside"))
        state = checkpoint.tree("optimizer")
        if sharding.is_sharded(self.model):
            sharding.load_whole_optimizer(self.model, self.optimizer, state)
        else:
            optim.load_state(self.optimizer, state)

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the model's buffers: the statistics of norms, which a forward pass changes before any check."""
        self.statistics.begin()
        buffers = list(self.model.buffers())
        if not self._before:
            self._before = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._before, buffers)  # hundreds of small tensors at once
        self._begun = True

    @torch.no_grad()
    def rewind(self) -> None:
        """Undo the changes of a step that was begun but not completed."""
        if self._begun:
            for buffer, copy in zip(self.model.buffers(), self._before, strict=True):
                buffer.copy_(copy)

    def done(self) -> None:
        """Count the current step as completed, and update the moving average if it is due and the weights moved."""
        self.step, self._begun = self.step + 1, False
        if self.ema is not None and not self.skipped and self.step % self.cfg.train.ema_every == 0:
            self.ema_updates += 1
            self.ema.update(self.model, self.ema_updates)


def train_mode(learner: nn.Module, frozen: list[nn.Module]) -> None:
    """Training mode, except for frozen modules: their norms keep their statistics, and nothing in them is dropped."""
    learner.train()
    for module in frozen:
        module.eval()


def make_ema(cfg: DictConfig, model: nn.Module, foreach: bool = True) -> ModelEmaV3 | None:
    """The moving average of the weights with decay `train.ema`, or None.

    Its updates are numbered from 1, as in timm's training script: the first takes the weights as they are, so that the
    initial ones are not part of the average. With `train.ema_warmup` the decay of update n is
    min(train.ema, (n - 1) / (n + 8)), TensorFlow's rule (which starts at 0.1) from the second update on: short runs
    average over their last tenth, whatever the final decay.

    foreach  many tensors at once, which must be all sharded or all whole: parameters and buffers of FSDP2 are mixed
    """
    if cfg.train.ema is None:
        return None
    warmup = dict(use_warmup=cfg.train.ema_warmup, warmup_gamma=9.0, warmup_power=1.0)
    return ModelEmaV3(model, decay=cfg.train.ema, foreach=foreach, **warmup)
