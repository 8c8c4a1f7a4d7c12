"""Compiles every kernel that the zoo's models launch, ahead of time and without a GPU.

    python -m zoo.kernels --jobs 2                            # all models, targets and dtypes, on two cores
    python -m zoo.kernels davit_t gcvit_t --targets sm_90 --dtypes bfloat16
    python -m zoo.kernels --all --jobs 2 --out benchmarks     # every configuration that the tuner may choose, too
    python -m zoo.kernels --dtypes float32 --float32 tf32     # for programs that allow TF32

A model runs forward and backward on the meta device, at its own size and at one that no window divides, while its
launches are recorded; equal ones are compiled once. A model that was released with other arguments runs with those too.
Binaries stay in Triton's cache, which speeds up a second run and the first launch on a GPU of that target.
The exit code is 1 if a kernel needs more shared memory than its target has, if one spills in a forward pass on sm_90,
or in a backward pass there, in its first configuration, for no reason that SPILLS knows.
"""

import argparse
import datetime
import functools
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ops.precision import multiply_float32
from ops.recording import Launch, recording
from ops.tool import ToolError, command, end_with, overwrite, positive, tool, writable

from .registry import class_of, variants
from .releases import RELEASES

DTYPES = ("bfloat16", "float16", "float32")


def launches(models: Sequence[str], most: int | None = 2, jobs: int = 1, dtype: str = "bfloat16") -> list[Launch]:
    """What one training step of each model, as in `built_as`, launches in a dtype, each distinct launch once.

    At most `most` blocks per stage are built: kinds of blocks alternate, so that two launch what all of them do.
    """
    from ops.ahead import distinct

    record = functools.partial(_launches_of, most=most, dtype=getattr(torch, dtype))
    return distinct(itertools.chain(*_shared(record, list(built_as(models).values()), jobs, 1)))


def built_as(models: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> model and arguments: of each model itself, and of it with each release's `arguments`, if it has any."""
    own, found = variants(), {}
    for model in models:
        found[model] = model, own[model]
        for given in (release.arguments for release in RELEASES if release.model == model and release.arguments):
            listed = ", ".join(f"{key}={value}" for key, value in given.items())
            found[f"{model} with {listed}"] = model, own[model] | given
    return found


def _launches_of(build: tuple[str, Mapping[str, Any]], most: int | None, dtype: torch.dtype) -> list[Launch]:
    from ops.ahead import distinct

    (model, args), found = build, []
    if most is not None:
        args = {**args, "depths": tuple(min(depth, most) for depth in args["depths"])}
    with torch.device("meta"):
        built = class_of(model)(**args).to(dtype)
        for module in built.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(_as_on_gpus)
        # how tokens are ranked depends on their number in all images
        for size, batch in ((args["img_size"], 2), (args["img_size"] + 13, 64)):
            with recording() as written:
                built(torch.empty(batch, 3, size, size, dtype=dtype)).sum().backward()
            found += distinct(written)
    return found


def _as_on_gpus(module: nn.Module, given: tuple, out: Tensor) -> Tensor:
    """A convolution's result, and the gradient of its input, in the layout of that input: on the meta device they have
    others, the gradient with torch 2.9.
    """
    if given[0].requires_grad:
        given[0].register_hook(_channels_last)
    return _channels_last(out)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


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
    with multiprocessing.get_context("fork").Pool(jobs, _begin, (os.getpid(),)) as pool:
        return pool.map(function, items, chunksize=size)


def _begin(parent: int) -> None:
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command: it ends its processes, in order


def parse(argv: list[str] | None) -> argparse.Namespace:
    try:
        from ops.ahead import TARGETS
    except ImportError as error:
        said = f"zoo.kernels needs the package triton, which cannot be imported here ({error}): pip install triton"
        raise ToolError(said) from error

    parser = argparse.ArgumentParser(prog="python -m zoo.kernels", description="Compiles the kernels of models.")
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--float32", choices=("ieee", "tf32"), default="ieee", help="how float32 is multiplied")
    parser.add_argument("--all", action="store_true", help="every configuration, not only the first")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that share the work")
    parser.add_argument("--out", type=Path, help="folder for kernels.md")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.models) - set(variants()))
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}: expected some of {', '.join(variants())}")
    args.models = args.models or list(variants())
    return args


@tool
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.out is not None:
        writable(args.out)
    from ops.ahead import configurations, distinct, table

    multiply_float32(args.float32)
    # separately for each dtype: how a call is divided into tiles depends on the element size
    written = distinct(itertools.chain(*(launches(args.models, jobs=args.jobs, dtype=dtype) for dtype in args.dtypes)))
    work = binaries(written, args.targets, args.all)
    costs = compile_all(work, args.jobs)
    names = list(built_as(args.models))
    page = ["# Kernels, compiled ahead of time", "", *_facts(names), "", table(costs), "", *_reasons(costs)]
    text = "\n".join(page)
    if args.out is not None:
        overwrite(args.out / "kernels.md", text)
    print(text)
    if bad := [cost for cost in costs if not cost.fits or cost.spills_forward]:
        sys.exit(f"{len(bad)} binaries need more shared memory than there is, or spill: {bad[0]}")
    first = [cost for (launch, _, config), cost in zip(work, costs, strict=True) if config == configurations(launch)[0]]
    if bad := unexplained(first):
        said = f"{len(bad)} binaries spill on sm_90 for no known reason: change the configuration, or add one to SPILLS"
        sys.exit(f"{said} of zoo/kernels.py: {bad[0]}")
    print(f"{len(costs)} binaries: all fit, no forward pass spills on sm_90")


# a kernel, a dtype of matmuls, or a target -> why binaries of it spill
SPILLS = {
    "window_attention.backward_kernel": (
        "the gradients of its logits are summed over windows in registers; in memory that would take atomics"
    ),
    "window_attention.backward_keys_kernel": (
        "a limit of 168 registers, with which three programs share a multiprocessor (windows of 14 took 112 us on an "
        "H200, and more than 133 without it)"
    ),
    "routed_attention.backward_keys_kernel": (
        "two warps share a tile of 64 by 64 (it took 143 us on an H200, and 267 with four)"
    ),
    "token_reallocation.backward_weight_kernel": "two warps; what it spills is read once, outside its loops",
    "float32": (
        "matmuls are computed from registers, of which the compiler gives a thread little more than 128, so that two "
        "programs share a multiprocessor; a few addresses and masks are spilled for it. TF32 has the same "
        "configurations"
    ),
    "sm_80": "limits and tiles were chosen on sm_90; no such GPU has run them yet",
    "sm_100": "limits and tiles were chosen on sm_90; no such GPU has run them yet",
    "gfx942": "nothing has been tuned for its compiler yet",
}


def unexplained(costs: Sequence[Any]) -> list:
    """The costs of those binaries for sm_90 that spill though SPILLS knows no reason that applies to them."""
    spilling = (cost for cost in costs if cost.target == "sm_90" and cost.spilled)
    return [cost for cost in spilling if not _words(cost) & set(SPILLS)]


def _words(cost: Any) -> set[str]:
    """What a reason for a binary's spills may be given for."""
    return {cost.kernel, cost.target} | ({cost.dtype} if cost.multiplies else set())


def _reasons(costs: Sequence[Any]) -> list[str]:
    """Lines of Markdown: why the binaries that spill do so, for which that is known."""
    spilling = {word for cost in costs if cost.spilled for word in _words(cost)}
    known = [f"- {word}: {reason}." for word, reason in SPILLS.items() if word in spilling]
    return ["Known reasons for spilling:", "", *known, ""] if known else []


def _facts(models: Sequence[str]) -> list[str]:
    import triton

    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- versions: torch {torch.__version__}, triton {triton.__version__}",
        f"- command: {command('zoo.kernels')}",
        f"- models: {', '.join(models)}",
        "",
        "Each row is the worst case over its binaries, which differ in window, channels per head, bias and the like.",
    ]


if __name__ == "__main__":
    main()
