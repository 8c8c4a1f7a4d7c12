"""Which implementation of an op runs.

Four names: `triton` (a fused kernel), `torch` (the fast path in ordinary PyTorch), `reference` (the readable
specification) and `auto` (the kernel where it runs, else `torch`, else `reference`; inside a transform of torch.func,
vmap, jvp, jacrev and the like, and inside a level of torch.autograd.forward_ad, which follow ordinary operators alone,
`reference`). The first of these that is not `auto` decides: the `impl` argument of the call, the innermost
`ops.implementation(...)`, the environment variable ZOO_ATTENTION. What is named is what runs: where it cannot, an error
says why.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .recording import is_recording

NAMES = ("auto", "triton", "torch", "reference")
VARIABLE = "ZOO_ATTENTION"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_CHANNELS = 128  # of a head, at most
# up to how many channels, and KiB of shared memory that kernels then hold at most, by the bytes of a number
SHARED = {4: ((32, 64), (64, 96), (128, 160)), 2: ((64, 40), (128, 96))}
NARROW = 32  # channels: kernels of so many fit every GPU, which need not be asked then
ORDINARY = (Tensor, torch.nn.Parameter, type(None))
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: no compiler can follow the question

# a plain list, not a context variable: torch.compile guards on it, and threads of one process share it; each setting is
# a list of its own, by which its context finds it again
_settings: list[list[str]] = []


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within this context every op called with `impl="auto"` runs the implementation `name`.

    `name` is "auto", "triton", "torch" or "reference"; contexts nest, the innermost counts, and "auto" gives the
    choice back to ZOO_ATTENTION or, where that is not set, to the op. It holds for the whole process, all threads.
    Raises ValueError for another name. Models scripted by TorchScript always run `torch`.
    """
    own = [_known(name, "ops.implementation")]
    _settings.append(own)
    try:
        yield
    finally:
        # not the last: that may be another thread's
        del _settings[next(i for i, setting in enumerate(_settings) if setting is own)]


def on_threads(x: Tensor) -> bool:
    """Whether operators on `x` run one by one on several threads of a CPU.

    PyTorch's fused attention gains less from a second thread there than products do.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.is_cpu and not recorded and not torch.is_autocast_enabled("cpu") and torch.get_num_threads() > 1


def choose(impl: str, x: Tensor, *, op: str, has: tuple[str, ...], channels: int | None = KERNEL_CHANNELS) -> str:
    """The implementation that runs: one of `has`, the implementations of `op` that exist.

    `x` is one of its inputs; its kernel takes up to so many `channels` on the last axis (None: any number). Raises
    ValueError for an unknown name, and RuntimeError where the named implementation cannot run.
    """
    name = _named(impl, op)
    if name == "auto":
        if "reference" in has and transformed():
            return "reference"
        # interpreted kernels run on CPU tensors, but so slowly that only who names them can want them
        if "triton" in has and (x.is_cuda or is_recording()) and _why_no_kernel(x, channels) is None:
            return "triton"
        return "torch" if "torch" in has else "reference"
    if name not in has:
        raise RuntimeError(
            f"{op} has no {name!r} implementation in this version, only {', '.join(map(repr, has))}: "
            f"ask for one of them or for 'auto' (impl=, ops.implementation or {VARIABLE})"
        )
    if name == "triton" and transformed():
        raise RuntimeError(
            f"{op} was asked for its 'triton' kernel, which does not run inside torch.func's transforms and "
            "torch.autograd.forward_ad's levels: use impl='auto' or 'reference'"
        )
    reason = _why_no_kernel(x, channels) if name == "triton" else None
    if reason is not None:
        raise RuntimeError(f"{op} was asked for its 'triton' kernel but {reason}: use impl='auto' or 'torch'")
    return name


def by_reference() -> bool:
    """Whether the reference runs of an op that is called now: for what is no op but has a fast way of its own too."""
    name = _named("auto")
    return name == "reference" or (name == "auto" and transformed())


def transformed() -> bool:
    """Whether a transform of torch.func follows what is computed now, or forward_ad, which has tangents in a level.

    torch has no public names for the questions.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched(*given: Tensor | None) -> bool:
    """Whether more than autograd follows what these tensors go through: a compiler, mode, subclass or transform."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() or transformed():
        return True
    return not all(type(t) in ORDINARY for t in given)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` is."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def under_autocast(*given: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast, where it is on, has for matrix products; else, as float64, unchanged."""
    if not autocasts(given[0]):
        return given
    dtype = torch.get_autocast_dtype(given[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in given)


def _named(impl: str, op: str = "an op") -> str:
    """What is asked for by `impl`, the innermost `implementation` or ZOO_ATTENTION, the first that is not "auto"."""
    name = _known(impl, f"{op}'s impl")
    if name == "auto" and _settings:
        name = _settings[-1][0]
    if name == "auto":
        name = _known(os.environ.get(VARIABLE, "auto"), VARIABLE)
    return name


def _known(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} is {name!r}: expected one of {', '.join(map(repr, NAMES))}")
    return name


def _why_no_kernel(x: Tensor, channels: int | None) -> str | None:
    """Why a Triton kernel cannot run on `x`; None where it can."""
    interpreted = x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"
    if not (x.is_cuda or x.is_meta or interpreted):
        return f"the tensors are on {x.device.type!r}, not on a GPU that Triton drives"
    if x.dtype not in KERNEL_DTYPES:
        return f"the tensors are {x.dtype}, and kernels take float32, float16 and bfloat16"
    if channels is not None and x.shape[-1] > channels:
        return f"a head has {x.shape[-1]} channels, and this kernel takes up to {channels}"
    if channels is not None and x.is_cuda and x.shape[-1] > NARROW:
        # kernels take autocast's precision
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        held, given = _held(x.shape[-1], dtype), _shared_memory(x.device.index)
        if held > given:
            return (
                f"a head of {x.shape[-1]} channels in {dtype} needs {held} KiB of shared memory, of which this GPU "
                f"gives a program {given}"
            )
    if not HAS_TRITON:
        return "the package triton is not installed"
    return None


def _held(channels: int, dtype: torch.dtype) -> int:
    """KiB of shared memory that a program of the kernels for heads of so many channels holds at most."""
    return min(kib for most, kib in SHARED[dtype.itemsize] if channels <= most)


@torch.compiler.assume_constant_result
def _shared_memory(device: int) -> int:
    """KiB of shared memory that one program of a kernel can have on a GPU."""
    # kernels hold less on AMD's: 64 KiB at most, which all have; without a driver nothing runs, and tensors are fake
    if torch.version.hip or not torch.cuda.is_available():
        return max(kib for _, kib in SHARED[4])
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024
