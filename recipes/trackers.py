"""Loggers beside metrics.jsonl: Weights & Biases, TensorBoard."""

from __future__ import annotations

import importlib
import math
import os
import re
import shlex
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from recipes import shell
from recipes.config import ConfigError, quote
from recipes.log import Sink, Through, writing
from recipes.provenance import first_session

EVENTS = "events.out.tfevents."  # how the names of event files begin
PACKAGES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def check(cfg: DictConfig) -> None:
    """Raise ConfigError if what `logger=` names is not available; called before a run has a folder."""
    if cfg.logger.wandb and "project" not in cfg.logger:
        raise ConfigError("logger.wandb=true does not set the project of the run: type logger=wandb, which does")
    for name in _chosen(cfg):
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise ConfigError(f"logger={name} needs a package that is not installed: pip install {name}") from error


def trackers(cfg: DictConfig, folder: Path, step: int) -> list[Sink]:
    """What `logger=` names, for a run that starts at `step`. Raises ConfigError if Weights & Biases refuses the run."""
    made = {"wandb": lambda: Wandb(cfg, folder), "tensorboard": lambda: TensorBoard(folder / "tensorboard", step)}
    return [made[name]() for name in _chosen(cfg)]


def _chosen(cfg: DictConfig) -> list[str]:
    return [name for name in PACKAGES if cfg.logger[name]]


class Wandb:
    """Weights & Biases; `logger.mode=offline`, or WANDB_MODE, keeps everything in the run folder."""

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
        self.errors = wandb.errors.Error
        try:
            self.run = wandb.init(**options)
        # no account, no network, an invalid WANDB_MODE, a user without a home folder, a disk that cannot be written
        except (wandb.errors.Error, ValueError, RuntimeError, OSError) as error:
            resume, chosen = quote("resume", str(folder)), ",".join(_chosen(cfg))
            asked = shlex.join([resume, f"logger=[{chosen}]" if "," in chosen else f"logger={chosen}"])
            raise ConfigError(
                f"Weights & Biases refuses the run: {error}\nresume once that is fixed, or keep its data on this "
                f"machine: {shell.command('train')} {asked} logger.mode=offline"
            ) from error
        self.run.define_metric("*", step_metric="step")  # a resumed run counts from its own step, not from wandb's

    def write(self, line: dict[str, Any]) -> None:
        with writing("to Weights & Biases", self.errors):
            self.run.log(line)

    def picture(self, step: int, image: Image.Image) -> None:
        import wandb

        self.write({"step": step, "val_picture": wandb.Image(image)})

    def close(self) -> None:
        with writing("to Weights & Biases", self.errors):
            self.run.finish()


def _wandb_id(folder: Path) -> str:
    """The id of a run at Weights & Biases; a run with the id of an earlier one continues that one there.

    `exp1/a` and `exp2/a` have different ids, and so does a folder that was removed and made again.
    """
    own = first_session(folder).get("id")  # runs from before there was one are identified by their name
    return re.sub(r"[/\\#?%:]", "-", "-".join([folder.name, *([own] if own else [])]))  # not allowed in an id


def _stamp(folder: Path) -> float:
    """The time that begins the name of an event file: TensorBoard reads them in the order of their names, so it must be
    later than any that is there, whatever the clock says.
    """
    found = [re.match(r"\d+(\.\d+)?", path.name.removeprefix(EVENTS)) for path in folder.glob(f"{EVENTS}*")]
    return max([time.time(), *(float(stamp[0]) + 1 for stamp in found if stamp)])


class TensorBoard:
    """Event files in the run folder, one series for each key; what an earlier start wrote after `step` is hidden.

    Lines are written at once: SummaryWriter's thread would meet a full disk later, and end with a traceback.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            name = f"{EVENTS}{_stamp(folder):.6f}.{socket.gethostname()}.{os.getpid()}"
            self.records = RecordWriter(Through(folder / name, "ab"))
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, line: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import scalar

        for key, value in line.items():
            if key != "step" and math.isfinite(value):
                group = "validation" if key.startswith("val_") else "training"
                self._add(step=line["step"], summary=scalar(f"{group}/{key.removeprefix('val_')}", value))

    def picture(self, step: int, image: Image.Image) -> None:
        from torch.utils.tensorboard import summary

        self._add(step=step, summary=summary.image("validation/picture", np.asarray(image), dataformats="HWC"))

    def close(self) -> None:
        with writing(self.folder):
            self.records.close()

    def _add(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with writing(self.folder):
            self.records.write(Event(wall_time=time.time(), **event).SerializeToString())
