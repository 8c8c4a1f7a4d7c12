"""Where a run computes: device, threads, precision, memory format."""

from __future__ import annotations

import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from recipes.config import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """The device of this process and how it computes."""

    device: torch.device
    amp: torch.dtype | None
    memory_format: torch.memory_format
    compile: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for forward passes, where it is asked for."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which only float16 on a GPU needs; elsewhere it passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16 and self.device.type == "cuda")

    def memory(self) -> float:
        """MiB that tensors took on the GPU at the most so far; on other devices the most that the process took."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kibibytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def place(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, memory_format=self.memory_format)

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model to call; its parameters are the given model's."""
        return torch.compile(model) if self.compile else model

    def send(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        return images, targets.to(self.device, non_blocking=True)


def setup(cfg: DictConfig) -> Hardware:
    """Choose the device and set threads and determinism for this process.

    Raises ConfigError for a device that is not there.
    """
    hardware = cfg.hardware
    device = _device(hardware.device)
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    if hardware.deterministic if hardware.deterministic is not None else device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and hides nothing here
        torch.backends.cudnn.benchmark = False
    memory_format = torch.channels_last if hardware.channels_last else torch.preserve_format
    return Hardware(device, DTYPES.get(hardware.amp), memory_format, hardware.compile)


def _device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind = name.split(":")[0]
    if not available.get(kind):
        there = ", ".join(kind for kind, there in available.items() if there)
        raise ConfigError(f"hardware.device={name} is not available here; there is {there}")
    return torch.device(name)
