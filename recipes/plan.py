"""How many steps, epochs and micro-batches a run has: the arithmetic between images and optimiser steps.

The images of a step are split into micro-batches, one forward pass each. The contents and random draws of a micro-batch
are a function of its number alone, so that it does not matter on which process it runs, or after which other one: with
fewer processes than micro-batches, a process does several of them in turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from recipes import data, distributed
from recipes.config import ConfigError
from recipes.data.loader import plan_batches

# advice where a micro-batch of one image is too small for a batch norm
LARGER_MICRO_BATCHES = (
    "give a larger data.batch_size, a smaller train.accumulate, train.micro_batch=2 or more, hardware.sync_bn=true on "
    "several GPUs, or"
)


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    micro       images of a micro-batch: of one forward pass of one process
    accumulate  micro-batches that each process does in an optimiser step
    world       processes
    per_epoch   optimiser steps in one epoch; images that do not fill a last step are left out
    steps       optimiser steps of the whole run
    evaluate_every  optimiser steps between evaluations
    """

    micro: int
    accumulate: int
    world: int
    per_epoch: int
    steps: int
    evaluate_every: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimiser step."""
        return self.accumulate * self.world

    @property
    def batch(self) -> int:
        """Images per optimiser step."""
        return self.micro * self.micro_batches

    def micro_batch(self, step: int, turn: int) -> int:
        """The number, counted over the run, of the micro-batch that this process does as its `turn`-th of a step."""
        return step * self.micro_batches + turn * self.world + distributed.rank()

    def describe(self, parallel: str | None, before: int | None) -> list[str]:
        """How the batch is split, for the log; `before` is how many micro-batches it had so far."""
        each = f"{self.accumulate} on each of {self.world} processes ({parallel})"
        where = each if self.world > 1 else "one after the other on one process"
        split = f"{self.micro_batches} micro-batches of {self.micro}, {where}"
        cut = split if self.micro_batches > 1 else "all at once, on one process"
        lines = [f"{self.batch} images per step: {cut}"]
        if before not in (None, self.micro_batches):
            return [
                *lines,
                f"there were {before} micro-batches before: batch norms and mixing now combine other images than then",
            ]
        return lines if self.micro_batches > 1 else []

    def evaluates(self, step: int) -> bool:
        """Whether the weights after `step` steps are evaluated; those before the first step are not."""
        return step > 0 and (step % self.evaluate_every == 0 or step == self.steps)


def make(cfg: DictConfig, source: data.Source, micro_batches: int | None = None) -> Plan:
    """Split the images of an optimiser step into micro-batches, share these between processes, and count the steps.

    There are `train.accumulate` micro-batches, or a multiple of it such that every process has the same number of them
    and none is larger than `train.micro_batch`.

    micro_batches  how many the run had so far, which is kept if the processes can share them
    Raises ConfigError if the batch does not divide or the training set does not fill one step.
    """
    size, accumulate, world = cfg.data.batch_size, cfg.train.accumulate, distributed.size()
    least = micro_batches or accumulate
    count = math.lcm(least, world)
    if size % count:
        raise ConfigError(
            f"data.batch_size={size} images per step cannot be split into train.accumulate={accumulate} micro-batches "
            f"on {world} process(es); choose a multiple of {count}{_sharing(size, least, world)}"
        )
    count = _small_enough(size, count, cfg.train.micro_batch)
    micro = size // count
    batches = data.batches_per_epoch(source, micro, world=world)
    per_epoch = batches * world // count
    if per_epoch == 0:
        raise ConfigError(
            f"data.batch_size={size} exceeds one epoch ({len(source)} training images); lower data.batch_size"
        )
    steps = round(cfg.train.epochs * per_epoch if cfg.train.steps is None else cfg.train.steps)
    if steps < 1:
        raise ConfigError(
            f"train.epochs={cfg.train.epochs} comes to {steps} steps of {size} images, expected at least one: give "
            "more epochs, or train.steps="
        )
    every = cfg.train.eval_every * per_epoch if cfg.train.eval_steps is None else cfg.train.eval_steps
    return Plan(micro, count // world, world, per_epoch, steps, max(1, round(every)))


def _sharing(size: int, least: int, world: int) -> str:
    """The numbers of processes nearest to `world` that can share a batch in a multiple of `least`, as a message."""
    able = [n for n in range(1, size + 1) if size % math.lcm(least, n) == 0]
    fewer, more = max((n for n in able if n < world), default=None), min((n for n in able if n > world), default=None)
    near = " or ".join(str(n) for n in (fewer, more) if n)
    return f", or start {near} process(es): a resumed run keeps its batch size" if near else ""


def _small_enough(size: int, count: int, most: int | None) -> int:
    """The smallest multiple of `count` that a batch divides into with at most `most` images each."""
    if most is None:
        return count
    return next(n for n in range(count, size + 1, count) if size % n == 0 and size // n <= most)


def batches(cfg: DictConfig, plan: Plan, source: data.Source, step: int) -> Iterator[tuple[Any, ...]]:
    """This process's micro-batches from `step` to the end of the run, epoch after epoch, as if started at step 0."""
    while True:
        epoch, offset = divmod(step, plan.per_epoch)
        left = (plan.per_epoch - offset) * plan.accumulate
        stream = data.batches(
            source,
            epoch=epoch,
            train=True,
            start=offset * plan.accumulate,
            rank=distributed.rank(),
            micro_batches=plan.micro_batches,
            **_order(cfg, plan),
        )
        for _, batch in zip(range(left), stream, strict=False):
            yield batch
        step += plan.per_epoch - offset


def images_of(cfg: DictConfig, plan: Plan, source: data.Source, step: int) -> list[int]:
    """Indices of the training images of one optimiser step, over all processes."""
    epoch, offset = divmod(step, plan.per_epoch)
    found = []
    for rank in range(plan.world):
        options = {"start": offset * plan.accumulate, "rank": rank, "micro_batches": plan.micro_batches}
        planned = plan_batches(source, epoch=epoch, train=True, **options, **_order(cfg, plan))
        for batch in planned[: plan.accumulate]:
            found += [index for index, _, _ in batch.keys]
    return found


def stream_state(
    cfg: DictConfig, plan: Plan, source: data.Source, step: int, *, readers: bool
) -> dict[str, Any] | None:
    """The state of a sharded training set after `step` steps, see recipes.data; None if it is read by index."""
    epoch, offset = divmod(step, plan.per_epoch)
    start = offset * plan.accumulate
    return data.stream_state(source, epoch=epoch, start=start, readers=readers, **_order(cfg, plan))


def _order(cfg: DictConfig, plan: Plan) -> dict[str, Any]:
    return {
        "batch_size": plan.micro,
        "seed": cfg.seed,
        "workers": cfg.data.workers,
        "world": plan.world,
        "repeats": cfg.augment.repeats,
    }
