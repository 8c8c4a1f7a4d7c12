"""Kernels compiled ahead of time, for GPUs that this machine need not have: what they cost in registers and memory.

    python -m zoo.kernels                    # all launches of the zoo's models, for all targets
    python -m zoo.kernels maxvit_t --targets sm_90

`zoo.kernels` records what models launch; this file compiles it.
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
from triton.compiler import ASTSource

from .recording import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one program may have
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
    """What a kernel needs: registers and bytes of spilled ones a thread, bytes of shared memory a program."""

    kernel: str
    target: str
    warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.target]


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each kernel, dtypes, constants and arguments that are None: each is a binary of its own."""
    found = {}
    for launch in launches:
        kinds = tuple(
            value if isinstance(value, torch.dtype) or value is None else type(value) for value in launch.values
        )
        found.setdefault((name(launch), kinds, launch.constants), launch)
    return list(found.values())


def name(launch: Launch) -> str:
    return f"{launch.kernel.fn.__module__.split('.')[-2]}.{launch.kernel.fn.__name__}"


def compile(launch: Launch, target: str, warps: int) -> Cost:
    """Compiles one launch. Raises triton's errors where the kernel does not build."""
    options = {"num_warps": warps, "num_stages": 2}
    binary = triton.compile(source(launch), target=TARGETS[target], options=options)
    if "cubin" in binary.asm:
        registers, spilled = cubin_usage(binary.asm["cubin"])
    else:
        registers, spilled = (number(binary.asm["amdgcn"], key) for key in ("vgpr_count", "private_segment_fixed_size"))
    return Cost(name(launch), target, warps, registers, spilled, binary.metadata.shared)


def source(launch: Launch) -> ASTSource:
    """The launch as Triton's launcher would specialise it: None and 1 are constants, multiples of 16 are marked."""
    kernel = launch.kernel.fn
    constants: dict[tuple, Any] = {}
    attributes: dict[tuple, list] = {}

    def kind(value: Any, path: tuple) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(item, (*path, i)) for i, item in enumerate(value))
        if value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.dtype) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.dtype):
            return POINTERS[value]
        return "i32" if abs(value) < 2**31 else "i64"

    names = kernel.arg_names
    signature = {names[i]: kind(value, (i,)) for i, value in enumerate(launch.values)}
    for key, value in launch.constants:
        signature[key] = "constexpr"
        constants[(names.index(key),)] = value
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spilled registers lie there) a thread, as Triton's own cuobjdump reads them."""
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
        raise ValueError(f"no {key} in what the compiler's tools printed: {text[-300:]!r}")
    return int(found[1])


def table(costs: list[Cost]) -> str:
    """Markdown: for each kernel, target and number of warps the worst over its dtypes and constants."""
    lines = [
        "| kernel | target | warps | binaries | registers | spilled bytes | shared KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.kernel, cost.target, cost.warps), []).append(cost)
    for (kernel, target, warps), row in sorted(groups.items()):
        worst = [max(getattr(cost, key) for cost in row) for key in ("registers", "spilled", "shared")]
        lines.append(
            f"| {kernel} | {target} | {warps} | {len(row)} | {worst[0]} | {worst[1]} | {worst[2] / 1024:.0f} |"
        )
    return "\n".join(lines)
