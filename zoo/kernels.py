"""Compiles every kernel that the zoo's models launch, ahead of time and without a GPU.

    python -m zoo.kernels --jobs 2                            # all models, targets and dtypes, on two cores
    python -m zoo.kernels davit_t gcvit_t --targets sm_90 --dtypes bfloat16
    python -m zoo.kernels --all --jobs 2 --out benchmarks     # every configuration that the tuner may choose, too

A model runs forward and backward on the meta device, at its own size and at one that no window divides, while its
launches are recorded; equal ones are compiled once. Binaries stay in Triton's cache, which speeds up a second run and
the first launch on a GPU of that target.
The exit code is 1 if a kernel needs more shared memory than its target has, or spills in a forward pass on sm_90.
"""

import argparse
import datetime
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ops.check.command import positive
from ops.recording import Launch, recording

from .registry import class_of, variants

DTYPES = ("bfloat16", "float16", "float32")


def launches(models: Sequence[str], most: int | None = 2, jobs: int = 1, dtype: str = "bfloat16") -> list[Launch]:
    """What one training step of each model launches in a dtype, each distinct launch once.

    At most `most` blocks per stage are built: kinds of blocks alternate, so that two launch what all of them do.
    """
    from ops.ahead import distinct

    found = _shared(functools.partial(_launches_of, most=most, dtype=getattr(torch, dtype)), models, jobs, 1)
    return distinct(itertools.chain(*found))


def _launches_of(model: str, most: int | None, dtype: torch.dtype) -> list[Launch]:
    from ops.ahead import distinct

    args, found = dict(variants()[model]), []
    if "depths" in args and most is not None:
        args["depths"] = tuple(min(depth, most) for depth in args["depths"])
    with torch.device("meta"):
        built = class_of(model)(**args).to(dtype)
        for size in (args["img_size"], args["img_size"] + 13):
            with recording() as written:
                built(torch.empty(2, 3, size, size, dtype=dtype)).sum().backward()
            found += distinct(written)
    return found


def binaries(written: Sequence[Launch], targets: Sequence[str], every: bool) -> list[tuple[Launch, str, Any]]:
    """What there is to compile: launch, target, configuration; the first configuration that fits, or `every` one."""
    from ops.ahead import configurations

    chosen = [(launch, configurations(launch)[: None if every else 1]) for launch in written]
    return [(launch, target, config) for launch, configs in chosen for target in targets for config in configs]


def compile_all(work: Sequence[tuple[Launch, str, Any]], jobs: int = 1) -> list:
    """The costs of all binaries, as `ops.ahead.Cost`. Raises the compiler's error if a kernel does not build."""
    return _shared(_compile, work, jobs, 4)


def _compile(work: tuple[Launch, str, Any]):
    from ops.ahead import compile

    return compile(*work)


def _shared(function: Callable, items: Sequence, jobs: int, size: int) -> list:
    """The results of a function for all items, computed by `jobs` processes that take `size` items at a time."""
    if jobs == 1:
        return list(map(function, items))
    # forked, so that none imports torch again; torch refuses a backward pass if the parent has run one on a GPU
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(function, items, chunksize=size)


def parse(argv: list[str] | None) -> argparse.Namespace:
    try:
        from ops.ahead import TARGETS
    except ImportError as error:
        sys.exit(f"zoo.kernels needs the package triton, which cannot be imported here ({error}): pip install triton")

    parser = argparse.ArgumentParser(prog="python -m zoo.kernels", description="Compiles the kernels of models.")
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--all", action="store_true", help="every configuration, not only the first")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that share the work")
    parser.add_argument("--out", type=Path, help="folder for kernels.md")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.models) - set(variants()))
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}: expected some of {', '.join(variants())}")
    args.models = args.models or list(variants())
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    from ops.ahead import distinct, table

    # separately for each dtype: how a call is divided into tiles depends on the element size
    written = distinct(itertools.chain(*(launches(args.models, jobs=args.jobs, dtype=dtype) for dtype in args.dtypes)))
    costs = compile_all(binaries(written, args.targets, args.all), args.jobs)
    text = "\n".join(["# Kernels, compiled ahead of time", "", *_facts(args.models), "", table(costs), "", SPILLS, ""])
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.md").write_text(text)
    if bad := [cost for cost in costs if not cost.fits or cost.spills_forward]:
        sys.exit(f"{len(bad)} binaries need more shared memory than there is, or spill: {bad[0]}")
    print(f"{len(costs)} binaries: all fit, no forward pass spills on sm_90")


SPILLS = """Why backward passes spill, on sm_90 unless stated otherwise:

- window_attention.backward_kernel, the whole pass for windows of one tile, up to 120 bytes in half precision and 128
  in float32: the gradients of its logits are summed over windows in registers, beside the matmuls of the pass. Summing
  them in memory would take atomics.
- window_attention.backward_keys_kernel in half precision, up to 232 bytes: it is limited to 168 registers, with which
  three programs share a multiprocessor. For windows of 14 it took 112 us on an H200, and more than 133 without that
  limit.
- routed_attention.backward_keys_kernel in half precision, 40 bytes in one binary: two warps share a tile of 64 by 64.
  It took 143 us on an H200, and 267 with four warps.
- token_reallocation.backward_weight_kernel, up to 16 bytes: two warps, and values stored once, outside its loops.
- In float32, up to 32 bytes: matmuls are computed from registers, of which the compiler gives a thread 128 or little
  more, so that two programs share a multiprocessor; a few addresses and masks are spilled for it.
- On sm_80 and sm_100, limits and tiles that were chosen on sm_90 cost up to 304 bytes, up to 48 also in forward passes
  of window, routed and neighborhood attention; no such GPU has run them yet.
- With Triton 3.9 two forward passes spill on sm_90: windows of 14 in float16 16 bytes, significance in float32 8.
- On gfx942 spills are up to 660 bytes; nothing has been tuned for its compiler yet.
"""


def _facts(models: Sequence[str]) -> list[str]:
    import triton

    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- versions: torch {torch.__version__}, triton {triton.__version__}",
        f"- command: python -m zoo.kernels {' '.join(sys.argv[1:])}",
        f"- models: {', '.join(models)}",
        "",
        "Each row is the worst case over its binaries, which differ in window, channels per head, bias and the like.",
    ]


if __name__ == "__main__":
    main()
