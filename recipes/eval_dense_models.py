"""Files of whole segmenters and detectors for eval.py: backbone, head and their sizes are recognised from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

import zoo
from recipes.config import ConfigError
from recipes.console import say
from recipes.data.paired import antialiased
from recipes.recognised import lacking, left_open
from recipes.task import create
from zoo.heads.recognise import DenseRecognition, recognise_dense
from zoo.reader import Description
from zoo.recognise import hint
from zoo.releases import Release

NAMES = {"ADE20K": ("ade20k", "ade20k_hub"), "COCO": ("coco",)}  # a benchmark and its names in `data`


def configure(cfg: DictConfig, file: Description) -> tuple[Release | None, dict[str, Any]]:
    """Set `model` and `task` of `cfg` to what a file holds; returns the release that it is, if its name says so, and
    the arguments that its backbone was built with.

    Unless something else is asked for, images are then resized as by OpenCV, without antialiasing. A file without
    mmseg's or mmdet's names is evaluated as the configuration describes. Raises ConfigError for a file of another task,
    and if the backbone, or how it was built, cannot be recognised.
    """
    path, found = file.path, recognise_dense(file.first, hint(file))
    if found is None:
        if cfg.model.name is None:
            raise ConfigError(
                f"{path} is not a segmenter in mmsegmentation's names or a detector in mmdetection's. Describe it: "
                "model=<backbone> task.head=<head> task.channels=<of its layers>; for a run, give run=runs/<name>"
            )
        return None, {}
    if found.task != cfg.task.name:
        raise ConfigError(f"{path} holds {found.head} for {found.classes} classes: expected task={found.task}")
    model = cfg.model.name or found.backbone.model
    if model is None:
        raise ConfigError(
            f"the backbone of {path} is {found.backbone.message}. Name it with model=, or with model=timm model.name="
        )
    variant = model.partition(".")[0]
    if said := lacking(cfg.model, found.backbone, variant, f"the backbone of {path}"):
        raise ConfigError(said)
    release = found.release(Path(path), variant)
    arguments = found.built_with(variant, release)
    _build_as(cfg, model, found, arguments)
    title = f", {release.method} of {release.source}" if release else ""
    say(f"{path} is evaluated as {found.head} on {model}{title}")
    return release, arguments


def published(cfg: DictConfig, release: Release) -> float | None:
    """The published figure in percent, if this is for the same images and classes, resized in the same way."""
    data = cfg.data
    if (
        data.name not in NAMES.get(release.benchmark, ())
        or antialiased(data)
        or data.left_out
        or data.get("side_multiple")
    ):
        return None
    short = data.short_side
    same = (short if short is None or isinstance(short, int) else max(short), data.long_side) == sides(release)
    if cfg.task.name == "segment":
        same &= cfg.task.inference == "whole" and list(cfg.task.scales) == [1.0] and not cfg.task.flip
    return release.metrics.get(create(cfg).score) if same else None


def sides(release: Release) -> tuple[int, int] | None:
    """The short side and the longest long one, in pixels, of the images that its published figure is for."""
    if release.test_size is not None or release.task == "detection":
        return release.test_size
    return release.img_size and (release.img_size, 4 * release.img_size)


def _build_as(cfg: DictConfig, model: str, found: DenseRecognition, wanted: dict[str, Any]) -> None:
    own = zoo.variants().get(model.partition(".")[0], {})
    with open_dict(cfg):
        cfg.model.name = model
        cfg.task.head = found.head
        cfg.task.update(found.options)
        if cfg.data.antialias is None:
            cfg.data.antialias = False
        cfg.model.update(left_open(cfg.model, wanted, own))
