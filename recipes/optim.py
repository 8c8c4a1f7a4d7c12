"""The optimiser, with timm's names and parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from recipes.config import ConfigError
from recipes.config.errors import near
from recipes.config.idle import optimizer_name
from recipes.console import say
from recipes.freeze import backbone_names, matching
from recipes.plan import Plan
from zoo.errors import first_line

# keys of cfg.optim that are not passed to timm
OURS = {
    "lr", "lr_base_batch", "lr_scaling", "decay", "no_decay", "model_lr_scales", "backbone_lr_scale", "head_lr_scale",
}  # fmt: skip

# on the CPU these have a fused loop over each tensor, where torch's default makes a pass per operation; on a GPU
# torch's choice is kept
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)

# options of a group that choose the implementation of a step, but not what it computes
LOOPS = ("fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a step: linear warmup, then a decay, then `cooldown` steps at `min_lr`. Lengths are in steps.

    shape         cosine, as in SGDR (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983, eq. 5), without restarts;
                  linear; constant; poly, the share that is left to the power of `power`; or step, a factor of `gamma`
                  at each of `milestones`, never below `min_lr`
    warmup_ratio  None: the rate rises from `warmup_lr` to the peak, and the decay follows. A number, as in OpenMMLab's
                  libraries: the decay runs from step 0, and during the warmup it is multiplied by a factor that rises
                  from this number to 1
    begins        step from which the decay is counted: None = the end of the warmup; 0, as in timm: the warmup replaces
                  the first part of the decay. It ends where the cooldown begins
    every         steps for which the rate keeps its value at the first of them
    shared        a model's own factor on the rate leaves `warmup_lr` and `min_lr` as they are; else all multiply them
    """

    steps: int
    lr: float
    shape: str = "cosine"
    warmup: int = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown: int = 0
    warmup_ratio: float | None = None
    power: float = 1.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    begins: int | None = None
    every: int = 1
    shared: bool = False

    def __call__(self, step: int, scale: float = 1.0, ends: float = 1.0) -> float:
        """The rate at a step for parameters with a peak of `scale` times the usual one.

        ends  factor on `warmup_lr` and `min_lr` where they are shared: `scale` without the model's own factor
        """
        return self._rate(step, scale * self.lr, ends) if self.shared else scale * self._rate(step, self.lr)

    def _rate(self, step: int, peak: float, ends: float = 1.0) -> float:
        start, last = ends * self.warmup_lr, ends * self.min_lr
        step -= step % self.every
        warm = step / self.warmup if step < self.warmup else 1.0
        if self.warmup_ratio is not None:
            return self._decayed(step, 0, peak, last) * (self.warmup_ratio + (1 - self.warmup_ratio) * warm)
        if warm < 1:
            return start + (peak - start) * warm
        return self._decayed(step, self.warmup if self.begins is None else self.begins, peak, last)

    def _decayed(self, step: int, begin: int, peak: float, last: float) -> float:
        if step >= self.steps - self.cooldown:
            return last
        if self.shape == "constant":
            return peak
        if self.shape == "step":
            return max(last, peak * self.gamma ** bisect_right(self.milestones, step))
        done = (step - begin) / (self.steps - begin - self.cooldown)
        left = (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done
        return last + (peak - last) * (left**self.power if self.shape == "poly" else left)


def base_lr(cfg: DictConfig) -> float:
    """The peak learning rate: `optim.lr`, scaled by batch size / `optim.lr_base_batch` where that is given.

    `optim.lr_scaling` says whether the ratio or its square root counts.
    """
    if not cfg.optim.lr_base_batch:
        return cfg.optim.lr
    power = {"linear": 1, "sqrt": 0.5}[cfg.optim.lr_scaling]
    return cfg.optim.lr * (cfg.data.batch_size / cfg.optim.lr_base_batch) ** power


def schedule(cfg: DictConfig, plan: Plan) -> Schedule:
    """The learning-rate schedule of a run.

    `sched.warmup` and `sched.cooldown` are counted in epochs or in steps, `sched.milestones` in epochs.
    """
    sched = cfg.sched
    unit = {"epochs": plan.per_epoch, "steps": 1}[sched.unit]
    warmup, cooldown = round(sched.warmup * unit), round(sched.cooldown * unit)
    if cooldown and warmup + cooldown > plan.steps:
        raise ConfigError(
            f"a cooldown of {cooldown} steps does not fit into {plan.steps} steps with a warmup of {warmup}: train "
            "longer (train.epochs, train.steps), or lower sched.cooldown or sched.warmup"
        )
    if sched.sched == "step" and not sched.milestones:
        raise ConfigError(
            "sched.sched=step needs milestones, and there are none: set sched.milestones=[8,11], in epochs"
        )
    if warmup >= plan.steps:
        given = f"sched.warmup={sched.warmup} {sched.unit}"
        say(f"this run of {plan.steps} steps ends during its warmup of {warmup} ({given}): lower sched.warmup")
    milestones = tuple(sorted(round(epoch * plan.per_epoch) for epoch in sched.milestones))
    if sched.sched == "step" and milestones[0] >= plan.steps:
        say(
            f"this run of {plan.steps} steps ends before the learning rate falls, at step {milestones[0]} "
            f"(sched.milestones={list(sched.milestones)} epochs): lower sched.milestones"
        )
    scale = cfg.data.batch_size / sched.lr_base_batch if sched.lr_base_batch else 1.0
    made = Schedule(
        steps=plan.steps,
        lr=base_lr(cfg),
        shape=sched.sched,
        warmup=warmup,
        warmup_lr=sched.warmup_lr * scale,
        min_lr=sched.min_lr * scale,
        cooldown=cooldown,
        warmup_ratio=sched.warmup_ratio,
        power=sched.power,
        milestones=milestones,
        gamma=sched.gamma,
        begins={"warmup": None, "start": 0}[sched.decay_from],
        every={"step": 1, "epoch": plan.per_epoch}[sched.per],
        shared=sched.shared_floor,
    )
    if _rises(made):
        say(
            f"the learning rate rises to sched.min_lr, {made.min_lr:.3g}, from a peak of {made.lr:.3g} with "
            f"data.batch_size={cfg.data.batch_size}: lower sched.min_lr"
        )
    if made.every > 1 and (warmup % made.every or cooldown % made.every):
        say(
            f"sched.per=epoch keeps the learning rate for an epoch, {made.every} steps: {made(0):.3g} in the first, as "
            f"the warmup takes {warmup} steps and the cooldown {cooldown}; give both in whole epochs"
        )
    return made


def _rises(made: Schedule) -> bool:
    """Whether the rate ends above its peak; rounding aside."""
    reached = made.shape != "constant" or made.cooldown
    return bool(reached) and made.min_lr > made.lr * (1 + 1e-9)


def create(cfg: DictConfig, model: nn.Module, beside: nn.Module | None = None) -> torch.optim.Optimizer:
    """timm's optimiser `optim.opt` over the model's groups: layer decay, and no weight decay for norms and biases.

    Parameters that the model names in `lr_scales()`, if it has that method, learn at these factors of the rate unless
    `optim.model_lr_scales` is false, times `optim.backbone_lr_scale` or `optim.head_lr_scale`; frozen ones are in no
    group. What is trained `beside` the model has the full rate and weight decay.
    Raises ConfigError for an optimiser that timm does not know, that needs second derivatives or a package or GPU that
    is missing, or that cannot step a sharded model; for an option that the optimiser does not take; and for names in
    `optim.decay` and `optim.no_decay` that match no parameter.
    """
    options = OmegaConf.to_container(cfg.optim, resolve=True)
    options = {key: value for key, value in options.items() if value is not None and key not in OURS}
    if _class(cfg, options) in FUSED and _plain(model, beside):
        options = {"fused": True} | options
    defaults = get_optimizer_info(optimizer_name(cfg.optim.opt)).defaults or {}
    if options.get("momentum") == 0 and "nesterov" in defaults:
        options = {"nesterov": False} | options  # which timm sets, and torch refuses where there is no momentum
    try:
        optimizer = create_optimizer_v2(model, lr=base_lr(cfg), **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim.opt={cfg.optim.opt} does not take these options: {error}; given {options}") from error
    if isinstance(model, FSDPModule):
        _check_steps_shared(cfg, model, options)
    decays = dict.fromkeys(_named(model, cfg.optim.decay, "optim.decay"), cfg.optim.weight_decay)
    decays |= dict.fromkeys(_named(model, cfg.optim.no_decay, "optim.no_decay"), 0.0)
    regroup(optimizer, lambda group, parameter: {"weight_decay": decays.get(parameter, group["weight_decay"])})
    scales, own = lr_scales(cfg, model), own_scales(cfg, model)
    if cfg.sched.shared_floor and (scales or cfg.optim.layer_decay is not None):
        regroup(optimizer, lambda group, p: {"ends_scale": group.get("lr_scale", 1.0) * scales.get(p, 1.0)})
    if scales or own:
        regroup(optimizer, lambda group, p: {"lr_scale": factors(group)[0] * own.get(p, 1.0) * scales.get(p, 1.0)})
    if beside is not None:
        whole = {"lr_scale": 1.0, "ends_scale": 1.0, "weight_decay": cfg.optim.weight_decay}
        group = {**optimizer.param_groups[0], **whole, "params": list(beside.parameters())}
        optimizer.param_groups.append(group)  # in place, see regroup
    return optimizer


def _class(cfg: DictConfig, options: dict[str, Any]) -> type[torch.optim.Optimizer]:
    """The class of timm's optimiser `optim.opt`; ConfigError if it cannot be used here or with these options."""
    names, name = list_optimizers(), optimizer_name(cfg.optim.opt)
    if name not in names:
        raise ConfigError(f"optim.opt={cfg.optim.opt} is not an optimiser of timm{near(cfg.optim.opt, names)}")
    info = get_optimizer_info(name)
    if info.second_order:
        raise ConfigError(
            f"optim.opt={cfg.optim.opt} needs second derivatives of the loss, which this loop does not compute: "
            "choose another, such as adamw"
        )
    if info.has_betas and len(options.get("betas", [0] * info.num_betas)) != info.num_betas:
        raise ConfigError(f"optim.betas={options['betas']}: optim.opt={cfg.optim.opt} takes {info.num_betas} of them")
    try:
        return get_optimizer_class(name, bind_defaults=False)
    except AssertionError as error:  # no GPU, or no such package
        raise ConfigError(
            f"optim.opt={cfg.optim.opt} is not available on this machine: {error}. Choose another, such as adamw"
        ) from error


def _check_steps_shared(cfg: DictConfig, model: FSDPModule, options: dict[str, Any]) -> None:
    """Raise ConfigError for an optimiser that cannot step sharded parameters, tried on a small model.

    Lookahead can, but hides its moments in the optimiser inside it, where torch does not look for what it saves.
    """
    if cfg.optim.opt.lower().startswith("lookahead_"):
        raise ConfigError(
            f"optim.opt={cfg.optim.opt} cannot be saved where the model is sharded, hardware.parallel=fsdp. Set "
            "hardware.parallel=ddp, or choose another optimiser, such as adamw"
        )
    mesh = next(model.parameters()).device_mesh
    with torch.random.fork_rng([]), torch.device(mesh.device_type):
        small = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32, 32))
    fully_shard(small, mesh=mesh)
    optimizer = create_optimizer_v2(small, lr=base_lr(cfg), **{k: v for k, v in options.items() if k != "layer_decay"})
    for parameter in small.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # torch's and timm's, as each operator words it
        raise ConfigError(
            f"optim.opt={cfg.optim.opt} cannot step a sharded model, hardware.parallel=fsdp: "
            f"{first_line(error)}\nSet hardware.parallel=ddp, or choose another optimiser, such as adamw"
        ) from error


def _plain(*modules: nn.Module | None) -> bool:
    """Whether everything that is trained is an ordinary CPU tensor, for which a fused step is safe."""
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return all(p.device.type == "cpu" and not isinstance(p, DTensor) and p.is_floating_point() for p in trained)


def lr_scales(cfg: DictConfig, model: nn.Module) -> dict[Tensor, float]:
    """Factors on the learning rate: those of the backbone and of the head."""
    backbone, head = cfg.optim.backbone_lr_scale, cfg.optim.head_lr_scale
    if (backbone, head) == (1, 1):
        return {}
    inside = set(backbone_names(model))
    return {parameter: backbone if name in inside else head for name, parameter in model.named_parameters()}


def own_scales(cfg: DictConfig, model: nn.Module) -> dict[Tensor, float]:
    """The model's own factors on the learning rate, unless `optim.model_lr_scales` is false."""
    if not (cfg.optim.model_lr_scales and hasattr(model, "lr_scales")):  # timm's models have no such method
        return {}
    named = dict(model.named_parameters())
    return {named[name]: scale for name, scale in model.lr_scales().items()}


def _named(model: nn.Module, patterns: list[str] | None, key: str) -> list[Tensor]:
    """The parameters that `cfg.optim` names."""
    named = dict(model.named_parameters())
    return [named[name] for name in matching(list(named), patterns or [], key)]


def regroup(optimizer: torch.optim.Optimizer, own: Callable[[dict[str, Any], Tensor], dict[str, Any]]) -> None:
    """Split the groups so that each parameter has its own options, `own(group, parameter)`.

    Done on the finished optimiser: timm makes the groups, and whatever else it writes into them is kept.
    """
    groups = []
    for group in optimizer.param_groups:
        parts: dict[tuple, list[Tensor]] = {}
        for parameter in group["params"]:
            parts.setdefault(tuple(own(group, parameter).items()), []).append(parameter)
        groups += [{**group, **dict(options), "params": part} for options, part in parts.items()]
    # in place: timm's Lookahead shares the list with the optimiser inside it
    optimizer.param_groups[:] = groups


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Set the learning rates of a step and return the rate of parameters without a factor.

    A group's `lr_scale` (layer decay, a model's own factors) multiplies its peak, `ends_scale` what is shared; see
    `Schedule`.
    """
    for group in optimizer.param_groups:
        group["lr"] = schedule(step, *factors(group))
    return schedule(step)


def factors(group: dict[str, Any]) -> tuple[float, float]:
    """A group's factors on the peak of the rate, and on ends that are shared."""
    return group.get("lr_scale", 1.0), group.get("ends_scale", 1.0)


def clip(model: nn.Module, limit: float | None) -> Tensor:
    """Scale the gradients down to a norm of `limit` (None: leave them) and return their norm before that."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if limit is None:
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    return nn.utils.clip_grad_norm_(parameters, limit)


def with_own_loops(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of a state dict, each with the `LOOPS` of this optimiser, which are the same in all of its groups.

    Those in a state dict belong to where it was saved; sharded parameters, or a GPU, may not support them.
    """
    own = {key: value for key, value in optimizer.param_groups[0].items() if key in LOOPS}
    return [{k: v for k, v in group.items() if k in own or k not in LOOPS} | own for group in groups]  # in their order


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, except for `LOOPS`, and give every moment the strides of its parameter again.

    Otherwise a channels-last parameter read from a file would have contiguous moments, and the update would run in
    other kernels than before, which round differently, or, if they are fused, take one for another.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {  # by the number of a parameter, as in torch's state dicts
        number: {key: _like(parameters[number], value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    groups = with_own_loops(optimizer, state["param_groups"])
    optimizer.load_state_dict({**state, "state": moments, "param_groups": groups})


def _like(parameter: Tensor, value: Any) -> Any:
    """A moment in the strides of its parameter; anything else, such as a count of steps, as it is."""
    if not isinstance(value, Tensor) or not value.ndim or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
