"""The optimiser, by timm's names and parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from recipes.config import ConfigError
from recipes.config.errors import near
from recipes.log import say
from recipes.plan import Plan

OURS = {"lr", "lr_base_batch"}  # keys of cfg.optim that do not go to timm


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a step: linear warm-up, then cosine, linear or constant, then `cooldown` steps at `min_lr`.

    The decay runs over the steps between warm-up and cooldown, both excluded; all lengths are in steps.
    Cosine as in SGDR (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983, eq. 5), without restarts.
    """

    steps: int
    lr: float
    shape: str = "cosine"
    warmup: int = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown: int = 0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup
        if step >= self.steps - self.cooldown:
            return self.min_lr
        if self.shape == "constant":
            return self.lr
        done = (step - self.warmup) / (self.steps - self.warmup - self.cooldown)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.min_lr + (self.lr - self.min_lr) * left


def base_lr(cfg: DictConfig) -> float:
    """The peak learning rate: `optim.lr`, scaled by batch size / `optim.lr_base_batch` where that is given."""
    base = cfg.optim.lr_base_batch
    return cfg.optim.lr * (cfg.data.batch_size / base if base else 1.0)


def schedule(cfg: DictConfig, plan: Plan) -> Schedule:
    """The learning-rate schedule of a run; `sched.warmup` and `sched.cooldown` are counted in epochs or in steps."""
    sched = cfg.sched
    unit = {"epochs": plan.per_epoch, "steps": 1}[sched.unit]
    warmup, cooldown = round(sched.warmup * unit), round(sched.cooldown * unit)
    if cooldown > plan.steps:
        raise ConfigError(
            f"a cooldown of {cooldown} steps does not fit into {plan.steps}: train longer (train.epochs, train.steps) "
            "or lower sched.cooldown"
        )
    if warmup >= plan.steps:
        say(f"this run of {plan.steps} steps ends within its warm-up of {warmup}; lower sched.warmup to learn more")
    return Schedule(plan.steps, base_lr(cfg), sched.sched, warmup, sched.warmup_lr, sched.min_lr, cooldown)


def create(cfg: DictConfig, model: nn.Module, beside: nn.Module | None = None) -> torch.optim.Optimizer:
    """timm's optimiser `optim.opt` over the model's groups: layer decay, and no weight decay for norms and biases.

    Parameters that the model names in `lr_scales()`, if it has that method, learn at these factors of the rate; frozen
    ones are in no group. What learns `beside` the model has the whole rate and weight decay.
    Raises ConfigError for an optimiser timm does not know and for an option that the optimiser does not take.
    """
    options = OmegaConf.to_container(cfg.optim, resolve=True)
    options = {key: value for key, value in options.items() if value is not None and key not in OURS}
    names = list_optimizers()
    if cfg.optim.opt.lower().rpartition("_")[2] not in names:  # timm's lookahead_ is a prefix
        raise ConfigError(f"optim.opt={cfg.optim.opt} is no optimiser of timm's{near(cfg.optim.opt, names)}")
    try:
        optimizer = create_optimizer_v2(model, lr=base_lr(cfg), **options)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"optim.opt={cfg.optim.opt} does not take these options: {error}; given {options}") from error
    for group in optimizer.param_groups:  # without weight decay timm puts all parameters into one
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    if hasattr(model, "lr_scales"):  # timm's models have no such method
        scale_rates(optimizer, {model.get_parameter(name): scale for name, scale in model.lr_scales().items()})
    if beside is not None:
        own = {"params": list(beside.parameters()), "lr_scale": 1.0, "weight_decay": cfg.optim.weight_decay}
        optimizer.param_groups.append({**optimizer.param_groups[0], **own})  # in place, see scale_rates
    return optimizer


def scale_rates(optimizer: torch.optim.Optimizer, scales: Mapping[Tensor, float]) -> None:
    """Split the groups so that each parameter in `scales` learns at that factor of its group's rate.

    Done on the finished optimiser: timm makes the groups, and what else it writes into them is kept.
    """
    if not scales:
        return
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            parts.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        whole = group.get("lr_scale", 1.0)
        groups += [{**group, "params": part, "lr_scale": whole * scale} for scale, part in parts.items()]
    # in place: timm's Lookahead shares the list with the optimiser inside it
    optimizer.param_groups[:] = groups


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the step's learning rate; a group's `lr_scale` (layer decay, a model's own factors) multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip(model: nn.Module, limit: float | None) -> Tensor:
    """The norm of all gradients before they are scaled down to `limit` (None leaves them as they are)."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if limit is None:
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    return nn.utils.clip_grad_norm_(parameters, limit)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict and give every moment its parameter's strides again.

    A channels-last parameter read from a file would have contiguous moments otherwise, and the update would run in
    other kernels than before, which round differently.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
