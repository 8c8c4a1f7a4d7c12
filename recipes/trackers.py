"""Where the numbers of a run go beside metrics.jsonl: Weights & Biases, TensorBoard."""

from __future__ import annotations

import importlib
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from recipes import shell
from recipes.config import ConfigError, quote
from recipes.log import Sink
from recipes.provenance import first_session

PACKAGES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def check(cfg: DictConfig) -> None:
    """Raise ConfigError where what `logger=` names cannot be had; before a run has a folder."""
    if cfg.logger.wandb and "project" not in cfg.logger:
        raise ConfigError("logger.wandb=true does not say where the run appears: type logger=wandb, which does")
    for name in _chosen(cfg):
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise ConfigError(f"logger={name} needs a package that is not there: pip install {name}") from error


def trackers(cfg: DictConfig, folder: Path, step: int) -> list[Sink]:
    """What `logger=` names, for a run that begins at `step`. Raises ConfigError where Weights & Biases refuses."""
    made = {"wandb": lambda: Wandb(cfg, folder), "tensorboard": lambda: TensorBoard(folder / "tensorboard", step)}
    return [made[name]() for name in _chosen(cfg)]


def _chosen(cfg: DictConfig) -> list[str]:
    return [name for name in PACKAGES if cfg.logger[name]]


class Wandb:
    """Weights & Biases; `logger.mode=offline` keeps everything in the run folder."""

    def __init__(self, cfg: DictConfig, folder: Path):
        import wandb

        options = dict(
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            mode=cfg.logger.mode,
            dir=folder,
            name=folder.name,
            id=_wandb_id(folder),
            resume="allow",
            config=OmegaConf.to_container(cfg, resolve=True),
        )
        try:
            self.run = wandb.init(**options)
        except wandb.errors.Error as error:  # no account, no network, no such entity
            resume = shlex.quote(quote("resume", str(folder)))
            raise ConfigError(
                f"Weights & Biases refuses the run: {error}\ngo on once it does not, or without it: "
                f"{shell.command('train')} {resume} logger.mode=offline"
            ) from error
        self.run.define_metric("*", step_metric="step")  # a resumed run counts on from its own step, not wandb's

    def write(self, line: dict[str, Any]) -> None:
        self.run.log(line)

    def picture(self, step: int, image: Image.Image) -> None:
        import wandb

        self.run.log({"step": step, "val_picture": wandb.Image(image)})

    def close(self) -> None:
        self.run.finish()


def _wandb_id(folder: Path) -> str:
    """What Weights & Biases knows a run by; of two with the same the later goes on with the earlier there.

    `exp1/a` and `exp2/a` are two, and so is a folder that was removed and begun anew.
    """
    own = first_session(folder).get("id")  # runs that were begun before there was one are known by their name
    return re.sub(r"[/\\#?%:]", "-", "-".join([folder.name, *([own] if own else [])]))  # what an id may not hold


class TensorBoard:
    """Event files in the run folder, one series for each key; what was written after `step` before is hidden."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and math.isfinite(value):
                group = "validation" if key.startswith("val_") else "training"
                self.writer.add_scalar(f"{group}/{key.removeprefix('val_')}", value, line["step"])

    def picture(self, step: int, image: Image.Image) -> None:
        self.writer.add_image("validation/picture", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
