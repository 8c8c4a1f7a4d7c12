"""Compiles kernels ahead of time, also for GPUs that are not present, and reports their registers and shared memory.

    python -m zoo.kernels                    # all launches of the zoo's models, for all targets
    python -m zoo.kernels maxvit_t --targets sm_90

`zoo.kernels` records what models launch; this module compiles it as Triton's launcher would. With the same version of
Triton, a GPU of that target finds the binaries in Triton's cache and does not compile them again.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .recording import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one program may use
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Cost:
    """What a kernel needs: registers and spilled bytes per thread, bytes of shared memory per program."""

    kernel: str
    target: str
    dtype: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    multiplies: bool = True  # whether it has matmuls

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.target]

    @property
    def spills_forward(self) -> bool:
        return self.target == "sm_90" and self.spilled > 0 and "backward" not in self.kernel


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each binary: for each kernel, its constants, and how its arguments are specialised."""
    found: dict[tuple, Launch] = {}
    for launch in launches:
        signature, constants, attributes = specialised(launch)
        found.setdefault((name(launch), str(signature), str(constants), str(attributes)), launch)
    return list(found.values())


def name(launch: Launch) -> str:
    return f"{launch.kernel.fn.__module__.split('.')[-2]}.{launch.kernel.fn.__name__}"


def configurations(launch: Launch) -> tuple[triton.Config, ...]:
    """The configurations that the tuner chooses from for this launch; deterministic mode uses the first."""
    return launch.kernel.choices.of(launch.values, dict(launch.constants))


def compile(launch: Launch, target: str, config: triton.Config | None = None) -> Cost:
    """Compiles one launch, by default in its first configuration. Raises Triton's errors if it does not build."""
    config = config or configurations(launch)[0]
    binary = built(launch, TARGETS[target], config.all_kwargs())
    if "cubin" in binary.asm:
        registers, spilled = cubin_usage(binary.asm["cubin"])
    else:
        registers, spilled = (number(binary.asm["amdgcn"], key) for key in ("vgpr_count", "private_segment_fixed_size"))
    sizes = (config.num_warps, config.num_stages, registers, spilled, binary.metadata.shared)
    return Cost(name(launch), target, dtype(launch), *sizes, multiplies="PRECISION" in dict(launch.constants))


@dataclass(frozen=True)
class Absent:
    """Stands in for the driver that Triton's launcher queries before it compiles, where there is no such GPU."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # the launcher's key for what it caches per device

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


def built(launch: Launch, target: GPUTarget, options: dict[str, Any]) -> Any:
    """The binary of a launch, compiled by the launcher itself so that it is cached under the key used at run time."""
    driver, kernel = triton.runtime.driver, launch.kernel.fn
    if target.backend == "hip":
        options.pop("maxnreg", None)  # an option of CUDA's compiler
    before = driver._active  # its public name would look for a GPU
    driver.set_active(Absent(target))
    try:
        return kernel.warmup(*launch.values, grid=(1,), **dict(launch.constants), **options)
    finally:
        driver.set_active(before)
        kernel.device_caches.pop(target, None)  # binaries that no launch on this machine will use


def dtype(launch: Launch) -> str:
    """The dtype of the data: the narrowest of the arguments."""
    found = min((v for v in launch.values if isinstance(v, torch.dtype)), key=lambda v: (v.itemsize, str(v)))
    return str(found).removeprefix("torch.")


def specialised(launch: Launch) -> tuple[dict[str, Any], dict[tuple, Any], dict[tuple, list]]:
    """The types of all arguments, which of them are constants (None and 1), and which are multiples of 16."""
    kernel = launch.kernel.fn
    constants: dict[tuple, Any] = {}
    attributes: dict[tuple, list] = {}

    def kind(value: Any, path: tuple) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(item, (*path, i)) for i, item in enumerate(value))
        special = not kernel.params[path[0]].do_not_specialize
        if value is None or (special and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.dtype) or (special and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.dtype):
            return POINTERS[value]
        return "i32" if abs(value) < 2**31 else "i64"

    names = kernel.arg_names
    signature = {names[i]: kind(value, (i,)) for i, value in enumerate(launch.values)}
    for key, value in launch.constants:
        signature[key] = "constexpr"
        constants[(names.index(key),)] = value
    return signature, constants, attributes


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (where registers are spilled) per thread, as read by Triton's own cuobjdump."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return number(text, "REG"), number(text, "STACK")


def number(text: str, key: str) -> int:
    found = re.search(rf"\b{key}:\s*(\d+)", text)
    if found is None:
        raise ValueError(f"no {key} in the output of the compiler's tools: {text[-300:]!r}")
    return int(found[1])


def table(costs: list[Cost]) -> str:
    """A Markdown table: for each kernel, target, dtype and configuration, the worst case over its constants."""
    lines = [
        "| kernel | target | dtype | warps | stages | binaries | spilling | registers | spilled bytes | shared KiB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple, list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.kernel, cost.target, cost.dtype, cost.warps, cost.stages), []).append(cost)
    for group, row in sorted(groups.items()):
        registers, spilled, shared = (max(getattr(c, key) for c in row) for key in ("registers", "spilled", "shared"))
        count = sum(cost.spilled > 0 for cost in row)
        cells = (*group, len(row), count, registers, spilled, round(shared / 1024))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
