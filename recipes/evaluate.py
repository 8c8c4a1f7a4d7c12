"""One pass over a validation set."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from recipes import data, distributed, sharding
from recipes.hardware import Hardware
from recipes.task import Metrics, Task


@torch.no_grad()  # not inference_mode: what a model caches here must be usable in training
def evaluate(
    cfg: DictConfig,
    task: Task,
    model: nn.Module,
    built: data.Data,
    hardware: Hardware,
    watch: Callable[[Iterable[Any], int], Iterator[Any]] = lambda batches, _: iter(batches),
    note: Callable[[Any, Any], None] = lambda predictions, targets: None,
) -> tuple[dict[str, float], Metrics]:
    """Metrics of the validation set, every image counted once, with `images_per_s`; leaves the model in eval mode.

    Several processes share the images, each in exactly one of them; the metrics are over all processes.

    With data.on_bad_image=replace, `bad_images` says how many images could not be decoded and were replaced.

    watch  called with the batches and their number, to show progress
    note   called with the predictions and targets of every batch, like the metrics
    """
    model.eval()
    metrics, begun = task.metrics(built), time.perf_counter()
    size = cfg.data.eval_batch_size or task.eval_batch_size
    rounds = -(-len(built.val) // (size * distributed.size()))
    batches = data.batches(
        built.val,
        batch_size=size,
        seed=cfg.seed,
        epoch=0,
        train=False,
        workers=cfg.data.workers,
        rank=distributed.rank(),
        world=distributed.size(),
    )
    with sharding.kept_whole(model):
        for batch in watch(distributed.together(batches, data.DataError, rounds), rounds):
            if batch is None:  # none left for this process; others have one
                continue
            images, targets = hardware.send(*batch, built.val.finish)
            with hardware.autocast():
                predictions = task.predict_with(model, images, targets)
            metrics.update(predictions, targets)
            note(predictions, targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")  # of a process that had no image
        values = metrics.compute()  # also waits for the device
    if bad := distributed.total(built.val.take_bad()):
        values["bad_images"] = bad
    return {**values, "images_per_s": round(len(built.val) / (time.perf_counter() - begun), 2)}, metrics
