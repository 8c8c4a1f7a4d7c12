"""Which implementation of an op runs.

There are four names: `triton` (a fused kernel), `torch` (the fast path in ordinary PyTorch), `reference` (the readable
specification) and `auto` (the kernel where it can run, on GPUs and for heads that it was made for; else `torch`, else
`reference`).
Inside transforms of torch.func (vmap, jvp, jacrev and the like) and levels of torch.autograd.forward_ad, which support
only ordinary operators, `auto` is `reference`. The first of these that is not `auto` decides: the `impl` argument of
the call, the innermost `ops.implementation(...)`, the environment variable ZOO_ATTENTION. A named implementation never
falls back to another: where it cannot run, an error says why.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .precision import precision
from .recording import is_recording

NAMES = ("auto", "triton", "torch", "reference")
VARIABLE = "ZOO_ATTENTION"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_CHANNELS = 128  # of a head, at most
# how values are multiplied -> (channels at most, KiB of shared memory that kernels then use at most), as compiled for
# sm_80: for GPUs with less memory Triton compiles in the same way, and sm_90 and sm_100 have enough for all kernels
SHARED = {
    "half": ((64, 57), (128, 97)),
    "ieee": ((32, 64), (64, 96), (128, 161)),
    "tf32": ((32, 64), (64, 112), (128, 224)),
}
# as compiled for gfx942, of which a program has 64 KiB as on all of AMD's GPUs
SHARED_AMD = {"half": ((128, 64),), "ieee": ((64, 64), (128, 112)), "tf32": ((64, 64), (128, 112))}
OLDEST = (8, 0)  # compute capability of the first GPUs for which Triton uses the units that multiply matrices
# channels up to which kernels that multiply float32 in IEEE precision fit the registers: with 128, compiled for sm_90,
# most spill 7 to 13 KB a thread
IN_REGISTERS = 64
NARROW = 32  # channels up to which kernels fit every GPU, so that the device need not be queried
ORDINARY = (Tensor, torch.nn.Parameter, type(None))
# how errors about a second derivative end
NO_SECOND = "has no second derivative: use impl='reference' for it, or ops.implementation('reference') around a model"
HAS_TRITON = importlib.util.find_spec("triton") is not None  # once, at import: a compiler cannot trace find_spec


class SharedMemoryError(RuntimeError):
    """A kernel was asked for, and its heads need more shared memory than this GPU allows a program."""


# a plain list, not a context variable: torch.compile guards on it, and threads of one process share it; each setting is
# a list of its own, so that its context can find it again by identity
_settings: list[list[str]] = []


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Context manager in which every op called with `impl="auto"` runs the implementation `name`.

    `name` is "auto", "triton", "torch" or "reference". Contexts nest and the innermost one applies; "auto" returns the
    choice to ZOO_ATTENTION or, if that is not set, to the op. The setting applies to all threads of the process.
    Raises ValueError for any other name. Models scripted by TorchScript always run `torch`.
    """
    own = [_known(name, "ops.implementation")]
    _settings.append(own)
    try:
        yield
    finally:
        # not the last one, which may belong to another thread
        del _settings[next(i for i, setting in enumerate(_settings) if setting is own)]


def eager(x: Tensor) -> bool:
    """Whether operators run eagerly on a CPU, without autocast, a trace or a compiler."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.is_cpu and not recorded and not torch.is_autocast_enabled("cpu")


def on_threads(x: Tensor) -> bool:
    """Whether operators on `x` run eagerly on several CPU threads.

    PyTorch's fused attention gains less from a second thread there than matmuls do.
    """
    return eager(x) and torch.get_num_threads() > 1


def learning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether any of these tensors needs a gradient."""
    learned = mask is not None and mask.requires_grad
    return differentiating() and (learned or q.requires_grad or k.requires_grad or v.requires_grad)


def differentiating() -> bool:
    """Whether autograd is enabled and may decide what runs.

    Not while torch.jit.trace records: it compares its graph with one traced without gradients, which must be the same.
    """
    if torch.jit.is_scripting():
        return torch.is_grad_enabled()
    else:
        return torch.is_grad_enabled() and not torch.jit.is_tracing()


def choose(
    impl: str,
    x: Tensor,
    *,
    op: str,
    has: tuple[str, ...] = NAMES[1:],
    channels: int | None = KERNEL_CHANNELS,
    unfit: str | None = None,
) -> str:
    """The implementation that runs: one of `has`, the implementations that `op` has, by default all three.

    x         one of its inputs
    channels  how many channels on the last axis its kernel supports; None: any number
    unfit     why its kernel does not support this call, if the op knows of a reason

    Raises ValueError for an unknown name, and RuntimeError where the named implementation cannot run: SharedMemoryError
    where only the GPU's shared memory does not suffice.
    """
    name = _named(impl, op)
    if name == "auto":
        if "reference" in has and transformed():
            return "reference"
        # interpreted kernels run on CPU tensors, but so slowly that they are only used when named
        given = "triton" in has and unfit is None and (x.is_cuda or is_recording())
        able = given and _why_no_kernel(x, channels) is None and _too_wide(x, channels) is None
        if able and _is_made_for(x, channels):
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
    if name == "triton":
        reason, error = unfit or _why_no_kernel(x, channels), RuntimeError
        if reason is None:
            reason, error = _too_wide(x, channels), SharedMemoryError
        if reason is not None:
            raise error(f"{op} was asked for its 'triton' kernel but {reason}: use impl='auto' or 'torch'")
    return name


def interprets() -> bool:
    """Whether TRITON_INTERPRET asks for kernels on CPU tensors, in one of the words that Triton accepts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def by_reference() -> bool:
    """Whether an op called now would run its reference: for code other than ops that has a fast path of its own."""
    name = _named("auto")
    return name == "reference" or (name == "auto" and transformed())


def transformed() -> bool:
    """Whether a torch.func transform or a forward_ad level is active.

    torch has no public API for either.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_batched(grad: Tensor, op: str) -> None:
    """Raises RuntimeError in a backward that is given several gradients as one, by torch.autograd's own vmap.

    It is none of torch.func's transforms, so that it does not decide what runs forward.
    """
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            f"{op} takes no batched gradients (is_grads_batched=True or vectorize=True): use impl='reference', or "
            "torch.func.jacrev"
        )


def watched(*given: Tensor | None) -> bool:
    """Whether more than autograd observes operations on these tensors: a compiler, mode, subclass or transform."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() or transformed():
        return True
    return not all(type(t) in ORDINARY for t in given)


def unseen(given: Sequence[Tensor | None]) -> bool:
    """Whether kernels run on these tensors now, in a call that is not `watched`.

    Then no operator is needed; calling one would take more CPU time than the rest of a launch. Operators of torch also
    negate what is only marked as negated, such as the imaginary part of a conjugate, which kernels would not see.
    """
    # `watched` comes first: a compiler could not trace the other conditions
    if watched(*given) or any(t is not None and t.is_neg() for t in given):
        return False
    return given[0].is_cuda or (given[0].is_cpu and interprets())


def autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled for the device of `x`."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autocast is disabled for the device of `x`; the meta device has none."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def under_autocast(*given: Tensor) -> tuple[Tensor, ...]:
    """The tensors cast to autocast's dtype where autocast is enabled; float64 tensors are never cast."""
    if not autocasts(given[0]):
        return given
    dtype = torch.get_autocast_dtype(given[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in given)


def like_maps(x: Tensor, *tables: Tensor | None) -> list[Tensor | None]:
    """Learned tables cast to the dtype of the map `x` where autocast is enabled; None stays None.

    Parameters are float32 there: kernels would have other binaries than those of a model that is in one dtype.
    """
    return [t if t is None or not autocasts(x) else t.to(x.dtype) for t in tables]


def ordered(x: Tensor) -> bool:
    """Whether torch refuses, for tensors on this device, operators that add in no fixed order; on CPUs all have one."""
    return not x.is_cpu and torch.are_deterministic_algorithms_enabled()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and ranked values are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _named(impl: str, op: str = "an op") -> str:
    """The first of `impl`, the innermost `implementation` and ZOO_ATTENTION that is not "auto"."""
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
    """Why a Triton kernel cannot run on `x`, whatever its GPU; None where it can."""
    if not (x.is_cuda or x.is_meta or (x.is_cpu and interprets())):
        return f"the tensors are on {x.device.type!r}, not on a GPU that Triton supports"
    if x.dtype not in KERNEL_DTYPES:
        return f"the tensors are {x.dtype}, and kernels take float32, float16 and bfloat16"
    if channels is not None and x.shape[-1] > channels:
        return f"a head has {x.shape[-1]} channels, and this kernel takes up to {channels}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    return None


def _too_wide(x: Tensor, channels: int | None) -> str | None:
    """Why kernels for the heads of `x`, which they support, do not fit its GPU; None where they do."""
    if channels is not None and x.is_cuda and x.shape[-1] > NARROW:
        dtype = _multiplied(x)
        held, given = _held(x.shape[-1], dtype), _shared_memory(x.device.index)
        if held > given:
            return (
                f"a head of {x.shape[-1]} channels in {dtype} needs {held} KiB of shared memory, and this GPU allows "
                f"a program {given}"
            )
    return None


def _is_made_for(x: Tensor, channels: int | None) -> bool:
    """Whether kernels, which can run on `x`, were made for its GPU and its channels."""
    if x.is_cuda and _is_older(x.device.index):
        return False
    exact = channels is not None and _multiplied(x) == torch.float32 and precision() == "ieee"
    return not exact or x.shape[-1] <= IN_REGISTERS


def _multiplied(x: Tensor) -> torch.dtype:
    """The dtype that kernels multiply in: autocast's where it is enabled."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def _held(channels: int, dtype: torch.dtype) -> int:
    """KiB of shared memory that a program uses at most, in kernels for heads of this many channels."""
    how = "half" if dtype.itemsize == 2 else precision().removesuffix("x3")
    return min(kib for most, kib in (SHARED_AMD if torch.version.hip else SHARED)[how] if channels <= most)


def _shared_memory(device: int) -> int:
    """KiB of shared memory that a GPU allows one program."""
    if torch.version.hip:
        return 64
    if not torch.cuda.is_available():  # tensors are fake, and nothing runs
        return max(kib for rows in SHARED.values() for _, kib in rows)
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


def _is_older(device: int) -> bool:
    """Whether a GPU is older than those that kernels are made for, such as a T4."""
    if torch.version.hip or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < OLDEST


# Compilers take the results for constants (and compile anew when TF32 is allowed). This is what the decorator
# torch.compiler.assume_constant_result sets; it also imports torch's compiler, which takes seconds, and thereby triton,
# whose kernels are only interpreted if that was asked for before.
_shared_memory._dynamo_marked_constant = True
_is_older._dynamo_marked_constant = True
precision._dynamo_marked_constant = True
