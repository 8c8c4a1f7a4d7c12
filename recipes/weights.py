"""The weights of a run, and those that `model.checkpoint` and `teacher.checkpoint` name: of a file or a run folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

import zoo
from recipes import distributed
from recipes.checkpoint import Checkpoint, CheckpointError, Store
from recipes.config import ConfigError
from recipes.data.build import preprocessing
from recipes.settings import RunError, has_config, load_config, resume_command
from zoo import reader
from zoo.blocks import image_sides, plain
from zoo.files import unreadable, weights_in
from zoo.formats import shared_out


def find_checkpoint(folder: Path) -> Checkpoint:
    """The best checkpoint of a run, or its newest if none has been evaluated.

    Raises RunError without any, and for one that cannot be read.
    """
    store = Store(folder / "checkpoints")
    try:
        for kind in ("best", "step"):
            if found := store.intact(kind):
                return found
    except CheckpointError as error:
        raise RunError(str(error)) from error
    raise RunError(f"{folder} has no intact checkpoint yet; train it further with: {resume_command(folder)}")


@dataclass(frozen=True)
class Kept:
    """The `tensors` of one part of a run's checkpoint: `model` or `ema`."""

    checkpoint: Checkpoint
    part: str
    tensors: dict[str, Tensor]

    @property
    def place(self) -> Path:
        return self.checkpoint.place(self.part)

    def as_file(self) -> reader.Checkpoint:
        """As if read from a file."""
        return reader.Checkpoint(str(self.place), {"ema" if self.part == "ema" else "raw": self.tensors})


def find_weights(folder: Path, weights: str = "auto") -> Kept:
    """The weights of `find_checkpoint`, the same on all processes, which must all call this.

    A run in progress replaces its checkpoints: if one is gone before all have read it, the newer one is taken.

    weights  "auto" those that the run evaluated, "raw", or "ema"

    Raises RunError, on all, for a run without an intact checkpoint, and for weights that it lacks or that cannot be
    read, such as those of a sharded checkpoint that holds more than its tensors.
    """
    while True:
        found = distributed.first(lambda: find_checkpoint(folder))
        try:
            return distributed.everywhere(partial(_kept, found, weights), (RunError,))
        except RunError:
            if distributed.first(partial(os.path.lexists, found.path)):
                raise


def _kept(found: Checkpoint, weights: str) -> Kept:
    part = {"auto": found.state["weights"], "raw": "model", "ema": "ema"}[weights]
    try:
        if not found.has(part):
            raise RunError(f"{found.path} has no {part} weights, as train.ema was null; auto takes those that it has")
        return Kept(found, part, found.tensors(part))
    except OSError as error:
        raise RunError(f"could not read {found.path}: {error}") from error
    except CheckpointError as error:
        raise RunError(str(error)) from error


def names_a_folder(given: str) -> bool:
    """Whether a folder is named, which must be a run folder.

    Raises ConfigError for a folder that holds files of weights, and for a sharded checkpoint; RunError for what cannot
    be looked at.
    """
    folder = Path(given)
    if why := shared_out(folder):
        raise ConfigError(f"{folder} {why}. The run folder works as well")
    if has_config(folder):
        return True
    is_one = os.path.isdir(folder)  # Path's own test fails where a name is too long for a file
    if is_one and (found := _weights_in(folder)):
        raise ConfigError(f"{folder} is not a run folder but holds weights: give one of its files, {found[0]}")
    return is_one


def _weights_in(folder: Path) -> list[Path]:
    try:
        return weights_in(folder)
    except OSError as error:
        raise RunError(unreadable(error.filename or folder, error)) from error


def of_run(given: str, weights: str = "auto") -> reader.Checkpoint:
    """The weights of a run's best checkpoint, or of its newest if none has been evaluated, as if read from a file.

    weights  "auto" those that it evaluated, "raw", or "ema"

    All processes must call this. Raises RunError for a folder that holds no run, for a run without an intact
    checkpoint, and for weights that it lacks or that cannot be read.
    """
    load_config(Path(given))
    return find_weights(Path(given), weights).as_file()


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
        there, here = (_size(load_config(Path(given)) if given and names_a_folder(given) else cfg), _size(cfg))
        if there == here:
            raise
        raise zoo.CheckpointError(
            f"{error}\n{given} was trained at {there} pixels, and this model is built for {here}: set "
            f"data.img_size={there}, or model.img_size={there} and, for timm's ViTs, +model.dynamic_img_size=true"
        ) from error


def _size(cfg: DictConfig) -> str:
    """The size that a model is built for, as it is typed."""
    size = plain(image_sides(cfg.model.img_size or preprocessing(cfg, train=True).size))
    return str(size) if isinstance(size, int) else f"[{size[0]},{size[1]}]"


def _variant(name: str) -> str:
    """A name without its tag and, for models of the zoo, its size: maxvit_t_384 has maxvit_t's weights, resized."""
    name = name.split(".")[0]
    return re.sub(r"_\d{3}(_k\d+)?$", "", name) if name in zoo.variants() else name
