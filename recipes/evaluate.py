"""One pass over a validation set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from recipes import data
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
) -> tuple[dict[str, float], Metrics]:
    """Metrics of the validation set, every image counted once, with `images_per_s`; leaves the model in eval mode.

    Where data.on_bad_image=replace let others stand for images that cannot be decoded, `bad_images` says for how many.
    watch  called with the batches and their number, to show progress
    """
    model.eval()
    metrics, size, begun = task.metrics(built), cfg.data.eval_batch_size, time.perf_counter()
    batches = data.batches(built.val, batch_size=size, seed=cfg.seed, epoch=0, train=False, workers=cfg.data.workers)
    for images, targets in watch(batches, -(-len(built.val) // size)):
        images, targets = hardware.send(images, targets)
        with hardware.autocast():
            predictions = task.predict(model, images)
        metrics.update(predictions, targets)
    values = metrics.compute()  # also waits for the device
    if bad := built.val.take_bad():
        values["bad_images"] = bad
    return {**values, "images_per_s": round(len(built.val) / (time.perf_counter() - begun), 2)}, metrics
