"""Predictions with weights that are not a run's: their classes, and how images are prepared, without a data set.

A data set is asked for by data.root=, by data.hub=, or by the name of one that needs no files. Only then it is read;
data=imagenet alone is not, as its classes are known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from timm.data import ImageNetInfo, infer_imagenet_subset

import zoo
from recipes import config, eval_dense_models, eval_models
from recipes.config import ConfigError
from recipes.config.idle import WHOLE
from recipes.config.quoting import key_of
from recipes.console import say
from recipes.data import Data, imagenet
from recipes.data.build import preprocessing, released
from recipes.task import Task
from zoo.blocks import plain
from zoo.checkpoint import only_part, part_of
from zoo.errors import printable
from zoo.heads.recognise import recognise_dense
from zoo.heads.segmenter import CLASSIFIERS
from zoo.reader import Description
from zoo.recognise import hint, without_prefix

WITHOUT_FILES = ("digits", "scenes")  # sources; each is the default of a task
PREPARED = ("img_size", "mean", "std", *WHOLE)  # keys of `data` by which those prepare images


def configuration(cfg: DictConfig, source: str | None) -> DictConfig:
    """The configuration that predicts with one of the `eval_models.sources`; `cfg` is not changed.

    If no data is named, images are prepared as for the model: those to classify as its pretrained configuration says,
    others resized as for the published figure of a release, else not resized, which is printed.
    Raises ConfigError or CheckpointError as `eval_models.find` does.
    """
    if _is_named(cfg) or (source is None and not cfg.model.pretrained):
        return eval_models.find(cfg, source).cfg
    typed, cfg = _typed(), copy.deepcopy(cfg)
    cfg.data.update({key: None for key in PREPARED if f"data.{key}" not in typed})
    found = eval_models.find(cfg, source)
    if cfg.task.name != "classify" and typed.isdisjoint(("data.short_side", "data.long_side")):
        _resize(found)
    return found.cfg


def _typed() -> set[str]:
    return {key_of(text) for text in config.overrides()}


def _is_named(cfg: DictConfig) -> bool:
    """Whether `data` says which data the weights are of: what a task defaults to does not."""
    return cfg.data.source not in WITHOUT_FILES or not _typed().isdisjoint(("data", "data.name", "data.source"))


def _resize(found: eval_models.EvaluatedModel) -> None:
    sides = found.release and eval_dense_models.sides(found.release)
    if sides is None:
        say("images are not resized: give data.short_side= and data.long_side= to resize them as in training", "yellow")
    else:
        found.cfg.data.short_side, found.cfg.data.long_side = sides


def is_read(cfg: DictConfig) -> bool:
    """Whether the data set is read: where it is asked for, and for random weights, which have no classes."""
    data = cfg.data
    if cfg.model.checkpoint is None and not cfg.model.pretrained:
        return True
    on_hub = data.hub is not None and data.source != "imagenet"
    return data.root is not None or on_hub or (data.source in WITHOUT_FILES and _is_named(cfg))


def data_of(task: Task) -> Data:
    """The data of the task if it is asked for, else as the weights describe it, without images.

    Its classes are as many as the weights have, with the names that the configuration or the file gives them, those of
    ImageNet, or their numbers. Raises ConfigError if it cannot be told how many there are.
    """
    cfg = task.cfg
    if is_read(cfg):
        return task.build_data()
    file = None if cfg.model.checkpoint is None else zoo.describe(cfg.model.checkpoint)
    count = cfg.model.num_classes or _count(cfg, file)
    if not count:
        raise ConfigError(
            f"{cfg.model.checkpoint or cfg.model.name} does not show how many classes it has: if it is a whole model, "
            "give model.num_classes="
        )
    names, subset = _names(cfg, file, count), imagenet.subset(cfg.data)
    if subset is not None:
        names = _within(names, subset, cfg)
    prep = preprocessing(cfg)
    return Data(
        train=None,
        val=None,
        num_classes=count,
        class_names=names,
        mean=prep.mean,
        std=prep.std,
        img_size=plain(preprocessing(cfg, train=True).size),
        subset=subset,
        left_out=tuple(index for index, name in enumerate(names) if name in cfg.data.left_out),
    )


def _count(cfg: DictConfig, file: Description | None) -> int | None:
    """How many classes the weights have; None if nothing tells."""
    known = released(cfg.model.name)
    if file is None:
        return known.get("num_classes")
    if cfg.task.name == "classify":
        file, _ = part_of(file, only_part(file))
        found, classifiers = zoo.recognise(file.first).classes, known.get("classifier") or ()
    else:
        dense = recognise_dense(file.first, hint(file))
        found, classifiers = dense and dense.classes, CLASSIFIERS
    return found or _rows(file, [classifiers] if isinstance(classifiers, str) else classifiers)


def _rows(file: Description, layers: Sequence[str]) -> int | None:
    """Outputs of the first of these layers that a file has."""
    state = without_prefix(file.first)
    weights = (state[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in state)
    return next((weight.shape[0] for weight in weights if weight.shape), None)


def _names(cfg: DictConfig, file: Description | None, count: int) -> list[str]:
    """The names of the classes, from the first that has as many. Raises ConfigError if data.class_names has not."""
    typed = cfg.data.class_names
    if typed is not None and not isinstance(typed, str) and len(typed) != count:
        raise ConfigError(f"data.class_names has {len(typed)} names, and the model {count} classes: give one each")
    given = [typed, *([] if file is None else _in_file(file.meta)), _beside(cfg)]
    if cfg.task.name == "classify":
        given.append(_of_imagenet(count))
    for names in given:
        if _are_names(names, count):
            return [printable(name) for name in names]
    say(f"nothing names the {count} classes: they are numbered; give the data with data.root= for its names", "yellow")
    return list(map(str, range(count)))


def _are_names(names: Any, count: int) -> bool:
    listing = isinstance(names, Sequence) and not isinstance(names, str)
    return listing and len(names) == count and all(isinstance(name, str) for name in names)


def _in_file(meta: Mapping[str, Any]) -> list[Any]:
    """What stands where MMCV, then MMEngine, write the names of the classes."""
    inner = meta.get("meta")
    inner = inner if isinstance(inner, Mapping) else {}
    data = inner.get("dataset_meta")
    data = data if isinstance(data, Mapping) else {}
    return [inner.get("CLASSES"), data.get("classes"), data.get("CLASSES")]


def _beside(cfg: DictConfig) -> list[str]:
    """The names in timm's config.json of a folder or of a repository of the hub."""
    known = released(cfg.model.name)
    words = known.get("label_descriptions") or {}
    return [words.get(name, name) for name in known.get("label_names") or []]


def _of_imagenet(count: int) -> list[str]:
    """The names of ImageNet-1k's classes, or of those of a larger ImageNet, by their number; empty for any other."""
    which = infer_imagenet_subset({"num_classes": count})
    return [text.split(",")[0] for text in ImageNetInfo(which).label_descriptions()] if which else []


def _within(names: list[str], subset: tuple[int, ...], cfg: DictConfig) -> list[str]:
    """The names of a subset of ImageNet's thousand classes."""
    if len(names) != len(imagenet.class_names()):
        raise ConfigError(
            f"data={cfg.data.name} is a subset of ImageNet-1k's thousand classes, and the model has {len(names)}: give "
            "other data, or leave it out"
        )
    return [names[index] for index in subset]
