"""The weights that `model.checkpoint` and `teacher.checkpoint` name: those of a file, or of a run folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

import zoo
from recipes.config import ConfigError
from recipes.data.build import preprocessing
from recipes.run import find_weights
from recipes.settings import load_config
from zoo.formats import shared_out
from zoo.inspect import files
from zoo.reader import Checkpoint


def is_run(given: str) -> bool:
    """Whether a folder is named, which must be a run folder.

    Raises ConfigError for a folder that holds files of weights, and for a sharded checkpoint.
    """
    folder = Path(given)
    if why := shared_out(folder):
        raise ConfigError(f"{folder} {why}. The run folder works as well")
    if folder.is_dir() and not (folder / "config.yaml").is_file() and (found := files([folder])):
        raise ConfigError(f"{folder} is not a run folder but holds weights: give one of its files, {found[0]}")
    return folder.is_dir()


def of_run(given: str, weights: str = "auto") -> Checkpoint:
    """The weights of a run's best checkpoint, or of its newest if none has been evaluated, as if read from a file.

    weights  "auto" those that it evaluated, "raw", or "ema"

    All processes must call this. Raises RunError for a folder that holds no run, for a run without an intact
    checkpoint, and for weights that it lacks or that cannot be read.
    """
    load_config(Path(given))
    kept = find_weights(Path(given), weights)
    return Checkpoint(str(kept.place), {"ema" if kept.part == "ema" else "raw": kept.tensors})


def check_model(given: str, name: str) -> None:
    """Raises ConfigError if a run trained another model than `name`; tags of weights and sizes are ignored."""
    own = load_config(Path(given)).model.name
    if _variant(own) != _variant(name):
        raise ConfigError(f"the run {given} trained {own}, and this is {name}: give model={own}, or another checkpoint")


@contextmanager
def at_a_size(cfg: DictConfig) -> Iterator[None]:
    """If weights do not fit a model of another image size, as with timm's ViTs, say at which size they were trained."""
    try:
        yield
    except zoo.CheckpointError as error:
        given = cfg.model.checkpoint
        there, here = (_size(load_config(Path(given)) if given and is_run(given) else cfg), _size(cfg))
        if there == here:
            raise
        raise zoo.CheckpointError(
            f"{error}\n{given} was trained at {there} pixels, and this model is built for {here}: set "
            f"data.img_size={there}, or model.img_size={there} and, for timm's ViTs, +model.dynamic_img_size=true"
        ) from error


def _size(cfg: DictConfig) -> str:
    """The size that a model is built for, as it is typed."""
    size = cfg.model.img_size or preprocessing(cfg, train=True).size
    sides = [size, size] if isinstance(size, int) else list(size)
    return str(sides[0]) if sides[0] == sides[1] else f"[{sides[0]},{sides[1]}]"


def _variant(name: str) -> str:
    """A name without its tag and, for models of the zoo, its size: maxvit_t_384 has maxvit_t's weights, resized."""
    name = name.split(".")[0]
    return re.sub(r"_\d{3}(_k\d+)?$", "", name) if name in zoo.variants() else name
