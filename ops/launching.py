"""How kernels are launched: on the right device, under Triton's interpreter, or only written down.

A launch that is written down (`recording`) needs no GPU: it holds all that the compiler has to know.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

WARPS = (4, 8)  # with two, tiles of 64 by 64 do not fit into registers

_records: list[list["Launch"]] = []


@dataclass(frozen=True)
class Launch:
    """One launch without its data: `values` are the arguments in order, a dtype in the place of each tensor."""

    kernel: Any
    values: tuple
    constants: tuple[tuple[str, Any], ...]


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
    if _records:
        _records[-1].append(Launch(kernel, tuple(map(described, values)), tuple(constants.items())))
        return
    device = next(value.device for value in values if isinstance(value, Tensor))
    # Triton launches on the current device, whatever device the tensors are on
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*values, **constants)


def described(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else value


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are written down, in order, and not run; tensors may be on the meta device."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def precision() -> str:
    """How `tl.dot` multiplies float32: exactly, unless the user allows TF32 for torch's own matrix products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
