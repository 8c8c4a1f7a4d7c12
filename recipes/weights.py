"""What `model.checkpoint` and `teacher.checkpoint` name: a file of weights, or the folder of a run."""

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
    """Whether a folder is named, which must be a run's.

    Raises ConfigError for one that holds files of weights, and for what is no file of them but a sharded checkpoint.
    """
    folder = Path(given)
    if why := shared_out(folder):
        raise ConfigError(f"{folder} {why}. The run's own folder serves as well")
    if folder.is_dir() and not (folder / "config.yaml").is_file() and (found := files([folder])):
        raise ConfigError(f"{folder} is no folder of a run but holds weights: give a file of them, {found[0]}")
    return folder.is_dir()


def of_run(given: str, weights: str = "auto") -> Checkpoint:
    """Those of a run's best checkpoint, or of its newest where none has been evaluated, as a file's would be read.

    weights  "auto" those that it measured, "raw", or "ema"

    All processes must come here. Raises RunError for a folder that holds no run, for a run without a whole checkpoint,
    and for weights that it lacks or that cannot be read.
    """
    load_config(Path(given))
    kept = find_weights(Path(given), weights)
    return Checkpoint(str(kept.place), {"ema" if kept.part == "ema" else "raw": kept.tensors})


def check_model(given: str, name: str) -> None:
    """Raises ConfigError where a run trained another model than `name`; tags of weights and sizes do not count."""
    own = load_config(Path(given)).model.name
    if _variant(own) != _variant(name):
        raise ConfigError(f"the run {given} trained {own}, and this is {name}: give model={own}, or another checkpoint")


@contextmanager
def at_a_size(cfg: DictConfig) -> Iterator[None]:
    """Say at which size a run learned whose weights do not fit a model built for another one, as timm's ViTs."""
    try:
        yield
    except zoo.CheckpointError as error:
        given = cfg.model.checkpoint
        there, here = (_size(load_config(Path(given)) if given and is_run(given) else cfg), _size(cfg))
        if there == here:
            raise
        raise zoo.CheckpointError(
            f"{error}\n{given} was trained at {there} pixels, and this model is built for {here}: give "
            f"data.img_size={there}, or model.img_size={there} and, of timm's ViTs, +model.dynamic_img_size=true"
        ) from error


def _size(cfg: DictConfig) -> str:
    """That a model is built for, as it is typed."""
    size = cfg.model.img_size or preprocessing(cfg, train=True).size
    sides = [size, size] if isinstance(size, int) else list(size)
    return str(sides[0]) if sides[0] == sides[1] else f"[{sides[0]},{sides[1]}]"


def _variant(name: str) -> str:
    """A name without its tag, of the zoo's without its size too: maxvit_t_384 has maxvit_t's weights, resized."""
    name = name.split(".")[0]
    return re.sub(r"_\d{3}(_k\d+)?$", "", name) if name in zoo.variants() else name
