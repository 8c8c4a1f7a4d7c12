"""The teacher of a distillation: a trained model of the zoo, of timm or of a run, which is never trained itself."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from timm.data import resolve_data_config
from torch import Tensor, nn

import zoo
from recipes import data_record, models, weights
from recipes.config import ConfigError
from recipes.console import say
from recipes.data import Data
from recipes.data.build import preprocessing
from recipes.settings import load_config
from zoo import releases
from zoo.blocks import image_sides


class Teacher(nn.Module):
    """In evaluation mode and without gradients; takes the student's images and normalises and resizes them for itself.

    mean, std    of the teacher; `data` has the student's
    size         (height, width) that images are resized to; None leaves them as the student sees them
    class_names  None if they are not known
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        data: Data,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int] | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        self.model, self.name, self.size, self.class_names = model, name, size, class_names
        own, theirs = (torch.tensor([*values]).view(2, 1, 3, 1, 1) for values in ((mean, std), (data.mean, data.std)))
        self.register_buffer("scale", theirs[1] / own[1])
        self.register_buffer("shift", (theirs[0] - own[0]) / own[1])
        self.eval().requires_grad_(False)

    @classmethod
    def create(cls, cfg: DictConfig, data: Data) -> Teacher:
        """The teacher that the `teacher` group names, for the images and classes of `data`. Raises ConfigError.

        Where models are built on the meta device, its weights are not loaded.
        """
        if cfg.checkpoint is not None and weights.names_a_folder(cfg.checkpoint):
            return cls._of_run(cfg, data)
        if cfg.name is None and cfg.checkpoint is not None:
            raise ConfigError(
                f"teacher.checkpoint={cfg.checkpoint} is not a run folder: give one, or teacher.name= beside a file"
            )
        if cfg.name is None or not (cfg.pretrained or cfg.checkpoint):
            raise ConfigError(
                f"teacher.kind={cfg.kind} needs a trained teacher: give teacher.checkpoint=runs/<name>, or "
                "teacher.name= with teacher.pretrained=true or teacher.checkpoint=<file>"
            )
        return cls._of_name(cfg, data)

    @classmethod
    def _of_run(cls, cfg: DictConfig, data: Data) -> Teacher:
        run = Path(cfg.checkpoint)
        own = load_config(run)
        known = data_record.described(run, own)
        if own.task.name != "classify":
            raise ConfigError(f"teacher.checkpoint={run} is a run of task={own.task.name}: expected task=classify")
        if cfg.name is not None:
            weights.check_model(cfg.checkpoint, cfg.name)
        own.model.pretrained, own.model.checkpoint = False, None  # the run's own start
        model, prep = models.create(own, known, pretrained=False), preprocessing(own)
        if not _meta():
            zoo.load_checkpoint(model, weights.of_run(cfg.checkpoint))
        fixed = prep.size if _is_fixed(model) else None
        size = _sides(cfg) or fixed
        return cls(model, own.model.name, data, prep.mean, prep.std, size, known.class_names)

    @classmethod
    def _of_name(cls, cfg: DictConfig, data: Data) -> Teacher:
        options = {"pretrained": not _meta()} if cfg.pretrained else {"num_classes": data.num_classes}
        model = models.build(timm.create_model, cfg.name, options, {"img_size": cfg.img_size})
        if cfg.checkpoint is not None and not _meta():
            report = zoo.load_checkpoint(model, cfg.checkpoint)
            if report.head_remade and cfg.kind != "feature":
                raise ConfigError(f"{report.message}: this teacher does not know the {data.num_classes} classes")
            say(report.message)
        prep = resolve_data_config({}, pretrained_cfg=_released(cfg) or model.pretrained_cfg)
        fixed = tuple(prep["input_size"][-2:]) if _is_fixed(model) else None
        return cls(model, cfg.name, data, prep["mean"], prep["std"], _sides(cfg) or fixed)

    @property
    def width(self) -> int:
        """Channels of its last feature map."""
        return self.model.feature_info[-1]["num_chs"]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, classes)
        return self.model(self.prepared(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, h, w)
        return self.model.forward_intermediates(self.prepared(images), indices=1, intermediates_only=True)[0]

    def prepared(self, images: Tensor) -> Tensor:
        """The images with the teacher's preprocessing."""
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images * self.scale + self.shift

    def checksum(self) -> int:
        """Of its weights, CRC-32."""
        found = 0
        for tensor in self.model.state_dict().values():
            found = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), found)
        return found

    def check_classes(self, count: int, names: list[str]) -> None:
        """Raises ConfigError if the teacher's classes are not the student's."""
        known = self.model.num_classes
        if known != count or self.class_names not in (None, names):
            what = f"{known} classes" if known != count else "other classes, or these in another order"
            raise ConfigError(
                f"the teacher {self.name} knows {what}, the student learns {count}: fine-tune the teacher on this data "
                "(recipe=finetune), or set teacher.kind=feature, which needs no common classes"
            )


def _meta() -> bool:
    """Whether models are built without memory for their weights."""
    return torch.get_default_device().type == "meta"


def _released(cfg: DictConfig) -> dict[str, Any] | None:
    """The preprocessing of the release that a file is named after; None if it is named after none."""
    found = None if cfg.checkpoint is None else releases.find(cfg.name, filename=cfg.checkpoint)
    return timm.get_pretrained_cfg(found.name).to_dict() if found is not None and found.loadable else None


def _sides(cfg: DictConfig) -> tuple[int, int] | None:
    return None if cfg.img_size is None else image_sides(cfg.img_size)


def _is_fixed(model: nn.Module) -> bool:
    return bool(getattr(model, "pretrained_cfg", {}).get("fixed_input_size"))
