"""How kernels are launched: on the right device, or under Triton's interpreter."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .recording import is_recording, write_down

WARPS = (4, 8)  # with two, tiles of 64 by 64 do not fit into registers


def tuned(kernel: Any) -> Any:
    """The kernel in a few configurations.

    Which of them runs is measured once for its constants and dtypes, never for the size of a map, and kept on disk.
    """
    if interpreted():
        return kernel
    constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    configs = [triton.Config({}, num_warps=count, num_stages=2) for count in WARPS]
    return triton.autotune(configs, key=constants, cache_results=True)(kernel)


def interpreted() -> bool:
    """Whether kernels run on CPU tensors, slowly: TRITON_INTERPRET=1 has to be set before kernels are imported."""
    return bool(triton.knobs.runtime.interpret)


def launch(kernel: Any, programs: int, *values: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel; strides pass as tuples."""
    if is_recording():
        return write_down(kernel, values, constants)
    device = next(value.device for value in values if isinstance(value, Tensor))
    # Triton launches on the current device, whatever device the tensors are on
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*values, **constants)


def precision() -> str:
    """How `tl.dot` multiplies float32: exactly, unless the user allows TF32 for torch's own matrix products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
