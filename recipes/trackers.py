"""Where the numbers of a run go beside metrics.jsonl: Weights & Biases, TensorBoard."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from recipes.config import ConfigError
from recipes.log import Sink


def trackers(cfg: DictConfig, folder: Path, step: int) -> list[Sink]:
    """What `logger=` names, for a run that begins at `step`. Raises ConfigError where its package is not there."""
    chosen = {"wandb": cfg.logger.wandb, "tensorboard": cfg.logger.tensorboard}
    made = {"wandb": lambda: Wandb(cfg, folder), "tensorboard": lambda: TensorBoard(folder / "tensorboard", step)}
    try:
        return [made[name]() for name, wanted in chosen.items() if wanted]
    except ImportError as error:
        raise ConfigError(f"logger={error.name} needs a package that is not there: pip install {error.name}") from error


class Wandb:
    """Weights & Biases; `logger.mode=offline` keeps everything in the run folder."""

    def __init__(self, cfg: DictConfig, folder: Path):
        import wandb

        self.run = wandb.init(
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            mode=cfg.logger.mode,
            dir=folder,
            name=folder.name,
            id=re.sub(r"[/\\#?%:]", "-", folder.name),  # what an id may not hold
            resume="allow",
            config=OmegaConf.to_container(cfg, resolve=True),
        )
        self.run.define_metric("*", step_metric="step")  # a resumed run counts on from its own step, not wandb's

    def write(self, line: dict[str, Any]) -> None:
        self.run.log(line)

    def picture(self, step: int, image: Image.Image) -> None:
        import wandb

        self.run.log({"step": step, "val_picture": wandb.Image(image)})

    def close(self) -> None:
        self.run.finish()


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
