"""The hardware of a run: device, threads, precision, memory format, and how it is distributed over devices."""

from __future__ import annotations

import errno
import inspect
import os
import re
import resource
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from recipes import config, distributed, sharding
from recipes.config import ConfigError
from recipes.console import say
from zoo.allocator import keep_freed_memory
from zoo.errors import first_line

KEEP_STRIDES = "strict_output_strides"
NO_C_COMPILER = "Failed to find C compiler"  # how Triton's error begins, which has no type of its own
# newer versions of torch have another name for it
KEEP_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_OWN_THREADS: list[int] = []  # how many there were before the first run that asked for others
SEVERAL = {"parallel": "fsdp", "sync_bn": True}  # values that need several processes


@dataclass(frozen=True)
class Hardware:
    """The device of this process and how it computes.

    parallel  how several devices share a model: each has all of it (ddp) or a part (fsdp); None for one process
    sync_bn   batch norms take their statistics over all devices
    """

    device: torch.device
    amp: torch.dtype | None
    memory_format: torch.memory_format
    compile: bool
    parallel: str | None = None
    sync_bn: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for forward passes, if it is asked for."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16, in which small gradients would vanish; otherwise it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)

    def memory(self) -> float:
        """Peak GPU memory of tensors so far, in MiB; on other devices the peak memory of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kibibytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def place(self, model: nn.Module) -> nn.Module:
        """The whole model on this device."""
        return model.to(self.device, memory_format=self.memory_format)

    def synced(self, model: nn.Module) -> nn.Module:
        """The model with synchronised batch norms, if asked for; their names, weights and buffers stay."""
        return convert_sync_batchnorm(model) if self.sync_bn else model

    def shard(self, model: nn.Module) -> None:
        """Shard the parameters, if devices share them."""
        if self.parallel == "fsdp":
            sharding.shard(model, self.device.type, self.amp)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The module to call in training; its parameters are the given model's."""
        if self.amp and self.device.type == "cpu":
            learn_norms_in_float32(model)
        if self.parallel == "ddp":
            devices = None if self.device.type == "cpu" else [self.device]
            # all processes would print it, for weights whose strides differ in axes of length 1
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            # buffers are not broadcast: the loop averages them over processes, see Statistics
            model = DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True, **{KEEP_BUFFERS: False}
            )
            if self.device.type == "cpu":
                model.register_comm_hook(None, distributed.mean_in_order)
        return compiled(model) if self.compile else model

    def syncing(self, forward: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context for one micro-batch: DDP all-reduces gradients in the last of a step, FSDP reduces them in each."""
        return nullcontext() if last or self.parallel != "ddp" else forward.no_sync()

    def send(self, images: Any, targets: Any, finish: Callable[[Any], Any] = lambda images: images) -> tuple[Any, Any]:
        """A batch on this device: tensors, also those in lists and dictionaries; anything else stays as it is.

        finish  what remains to be done to the images, on the device: `Source.finish`
        """
        return self._formed(finish(self._sent(images))), self._sent(targets)

    def _sent(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device, non_blocking=True)
        if isinstance(value, dict):
            return {key: self._sent(item) for key, item in value.items()}
        return [self._sent(item) for item in value] if isinstance(value, list | tuple) else value

    def _formed(self, images: Any) -> Any:
        whole = isinstance(images, Tensor) and images.ndim == 4
        return images.to(memory_format=self.memory_format) if whole else images


def compiled(model: nn.Module) -> nn.Module:
    """The model, compiled by torch.compile.

    In a graph for many sizes, PyTorch before 2.15 cannot order the strides of a view that is kept for a gradient, such
    as the map before a convolution. Where it can be told to keep them as they are, it is; else each size has a graph.
    """
    if TorchVersion(torch.__version__) >= "2.15":
        return torch.compile(model)
    from torch._inductor import config as inductor  # which takes a second

    if hasattr(inductor, KEEP_STRIDES):
        return torch.compile(model, options={KEEP_STRIDES: True})
    return torch.compile(model, dynamic=False)


def learn_norms_in_float32(model: nn.Module) -> None:
    """Let layer norms compute in float32 in training, as autocast does on GPUs but not on CPUs.

    In half precision PyTorch's CPU kernel (2.9 to 2.15) also sums the gradients of weight and bias in that precision:
    over the 50,000 tokens of 16 maps of 56 x 56, the bias gets a small part of its gradient.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.register_forward_pre_hook(_as_float32)


def _as_float32(norm: nn.LayerNorm, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(norm.weight.dtype), *inputs[1:]) if norm.training else inputs


def is_of_the_compiler(error: Exception) -> bool:
    """Whether torch.compile could not compile, as where a signal has ended the compiler that it called."""
    dynamo = sys.modules.get("torch._dynamo.exc")  # imported, which takes a second, by what raises such an error
    return dynamo is not None and isinstance(error, dynamo.BackendCompilerFailed)


def why_not_compiled(error: Exception) -> str | None:
    """What keeps torch.compile from compiling on this machine, and what to do; None for any other error."""
    if not is_of_the_compiler(error):
        return None
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    cause = error.inner_exception
    said = first_line(cause)
    if isinstance(cause, CppCompileError):
        found = re.search(r".*\b(?:error|failed):.*", cause.output)
        said = found[0].strip() if found else said
    elif not (isinstance(cause, InvalidCxxCompiler | OSError) or said.startswith(NO_C_COMPILER)):
        return None
    if isinstance(cause, OSError) or os.strerror(errno.ENOSPC) in said:
        mend = "set TMPDIR and TORCHINDUCTOR_CACHE_DIR to folders with room"
    else:
        mend = "install a compiler that works here, such as g++"
    return f"torch.compile could not compile: {said}\n{mend}, or give hardware.compile=false"


def setup(cfg: DictConfig) -> Hardware:
    """Choose the device and set threads and determinism for this process.

    Raises ConfigError for a device that is not available, and for what the device cannot do.
    """
    hardware = cfg.hardware
    device = _device(hardware.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    learns = "augment" in cfg  # an evaluation has none, not even that of a run
    if hardware.sync_bn and learns and distributed.size() > 1 and device.type != "cuda":
        raise ConfigError(
            f"hardware.sync_bn=true: PyTorch's SyncBatchNorm only trains on GPUs, and this is {device.type}; "
            "leave it out, and each part of a batch is normalised on its own"
        )
    if learns and distributed.size() == 1:
        for key in (key for key, value in SEVERAL.items() if hardware[key] == value):
            say(f"hardware.{key}={str(hardware[key]).lower()} has no effect with one process: see torchrun", "yellow")
    _set_threads(hardware.threads)
    if hardware.compile and config.job_number():  # its graphs are not to depend on the sizes of earlier runs of a sweep
        torch.compiler.reset()
    strict = device.type == "cpu" if hardware.deterministic is None else hardware.deterministic
    torch.use_deterministic_algorithms(strict)  # set either way: the previous run of a sweep may have enabled it
    if strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it matmuls raise on a GPU
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and hides nothing here
        torch.backends.cudnn.benchmark = False
    memory_format = torch.channels_last if hardware.channels_last else torch.preserve_format
    parallel = hardware.parallel if distributed.size() > 1 else None
    synced = hardware.sync_bn and parallel is not None
    return Hardware(device, DTYPES.get(hardware.amp), memory_format, hardware.compile, parallel, synced)


def _set_threads(count: int | None) -> None:
    """As many CPU threads as asked for; else those that there were before the previous run of a sweep asked."""
    if count is not None:
        _OWN_THREADS.append(torch.get_num_threads())
        torch.set_num_threads(count)
    elif _OWN_THREADS:
        torch.set_num_threads(_OWN_THREADS[0])


def _device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind = name.split(":")[0]
    if not available.get(kind):
        there = ", ".join(kind for kind, there in available.items() if there)
        raise ConfigError(f"hardware.device={name} is not available here, only {there}: hardware=auto takes the best")
    if distributed.size() > 1:
        return _own_device(name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"hardware.device={name} is no device: expected auto, cpu, cuda, cuda:0, mps") from error
    return _gpu(device) if kind == "cuda" else device


def _gpu(device: torch.device) -> torch.device:
    """A GPU by its number, which torch.cuda.set_device needs; without a number, torch's current GPU."""
    here = torch.cuda.device_count()
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= here:
        raise ConfigError(f"hardware.device={device} is not available here, only {_range(here)}")
    return device


def _range(here: int) -> str:
    return "cuda:0" if here == 1 else f"cuda:0 to cuda:{here - 1}"


def _own_device(name: str) -> torch.device:
    """The device of one of several processes."""
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"hardware.device={name} cannot be used by {distributed.size()} processes; give cpu or cuda")
    if name == "cpu":
        return torch.device(name)
    here = torch.cuda.device_count()
    if distributed.local_rank() >= here:
        raise ConfigError(
            f"at least {distributed.local_rank() + 1} processes, but only {here} GPUs: set --nproc-per-node={here}"
        )
    return torch.device(name, distributed.local_rank())
