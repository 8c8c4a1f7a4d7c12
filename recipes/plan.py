"""How many steps, epochs and micro-batches a run has: the arithmetic between images and optimiser steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from recipes import data
from recipes.config import ConfigError
from recipes.data.loader import plan_batches


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    micro       images in one forward pass of one process
    accumulate  forward passes per optimiser step
    per_epoch   optimiser steps in one epoch; the images that do not fill a last step are left out
    steps       optimiser steps of the whole run
    evaluate_every  optimiser steps between evaluations
    """

    micro: int
    accumulate: int
    per_epoch: int
    steps: int
    evaluate_every: int

    @property
    def batch(self) -> int:
        """Images per optimiser step and process."""
        return self.micro * self.accumulate


def make(cfg: DictConfig, source: data.Source, world: int = 1) -> Plan:
    """Split `data.batch_size` images per optimiser step over processes and micro-batches and count the steps.

    Raises ConfigError where the batch does not divide or the training set does not fill one step.
    """
    size, accumulate = cfg.data.batch_size, cfg.train.accumulate
    if accumulate < 1 or size < 1 or size % (accumulate * world):
        raise ConfigError(
            f"data.batch_size={size} images per step do not divide over train.accumulate={accumulate} micro-batches "
            f"of {world} process(es); choose a multiple of {max(accumulate, 1) * world}"
        )
    micro = size // (accumulate * world)
    batches = data.batches_per_epoch(source, micro, world=world, repeats=cfg.augment.repeats)
    per_epoch = batches // accumulate
    if per_epoch == 0:
        raise ConfigError(
            f"data.batch_size={size} is more than one epoch has ({len(source)} training images); lower data.batch_size"
        )
    steps = round(cfg.train.epochs * per_epoch if cfg.train.steps is None else cfg.train.steps)
    counts = {f"train.{key}": cfg.train[key] for key in ("save_every", "log_every")}
    for key, value in {"steps of the run": steps, **counts}.items():
        if value < 1:
            raise ConfigError(f"{key}: {value} is too few; at least 1")
    return Plan(micro, accumulate, per_epoch, steps, max(1, round(cfg.train.eval_every * per_epoch)))


def micro_batches(
    cfg: DictConfig, plan: Plan, source: data.Source, step: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Any, ...]]:
    """All micro-batches from `step` to the end of the run, epoch after epoch, exactly as if begun at step 0."""
    while True:
        epoch, offset = divmod(step, plan.per_epoch)
        left = (plan.per_epoch - offset) * plan.accumulate
        stream = data.batches(
            source,
            epoch=epoch,
            train=True,
            start=offset * plan.accumulate,
            rank=rank,
            world=world,
            **_order(cfg, plan),
        )
        for _, batch in zip(range(left), stream, strict=False):
            yield batch
        step += plan.per_epoch - offset


def images_of(cfg: DictConfig, plan: Plan, source: data.Source, step: int) -> list[int]:
    """Indices of the training images of one optimiser step of a single process."""
    epoch, offset = divmod(step, plan.per_epoch)
    first = offset * plan.accumulate
    batches = plan_batches(source, epoch=epoch, train=True, start=first, **_order(cfg, plan))
    return [index for batch in batches[: plan.accumulate] for index, _, _ in batch.keys]


def position(cfg: DictConfig, plan: Plan, source: data.Source, step: int, world: int = 1) -> dict[str, Any] | None:
    """Where a training set in shards is after `step` steps, for the checkpoint; None for one that is read by index."""
    epoch, offset = divmod(step, plan.per_epoch)
    start = offset * plan.accumulate
    return data.position(source, epoch=epoch, start=start, world=world, **_order(cfg, plan))


def _order(cfg: DictConfig, plan: Plan) -> dict[str, Any]:
    return {
        "batch_size": plan.micro,
        "seed": cfg.seed,
        "workers": cfg.data.workers,
        "repeats": cfg.augment.repeats,
    }
