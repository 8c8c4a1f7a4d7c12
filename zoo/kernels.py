"""Compile, ahead of time and without a GPU, every kernel that the zoo's models launch.

    python -m zoo.kernels                                     # all models, all targets; an hour or so on two cores
    python -m zoo.kernels davit_t gcvit_t --targets sm_90 --dtypes bfloat16 --out benchmarks

A model runs forward and backward on the meta device, at its own size and at one that no window divides, while launches
are written down; equal ones are compiled once.
"""

import argparse
import datetime
import multiprocessing
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from ops.recording import Launch, recording

from .registry import class_of, variants

DTYPES = ("bfloat16", "float16", "float32")

_work: list[tuple[Launch, str, int]] = []  # read by the processes that are forked after it is filled


def launches(model: str, dtype: str) -> list[Launch]:
    """What one training step of a model launches, each distinct launch once."""
    from ops.ahead import distinct

    args, found = variants()[model], []
    with torch.device("meta"):
        built = class_of(model)(**args).to(getattr(torch, dtype))
        for size in (args["img_size"], args["img_size"] + 13):
            image = torch.empty(2, 3, size, size, dtype=getattr(torch, dtype))
            with recording() as written:
                built(image).sum().backward()
            found += written
    return distinct(found)


def compile_models(
    models: Sequence[str], targets: Sequence[str], dtypes: Sequence[str], warps: Sequence[int], jobs: int = 1
) -> list:
    """The costs of all binaries, as `ops.ahead.Cost`. Raises the compiler's error where a kernel does not build."""
    from ops.ahead import distinct

    written = distinct([launch for model, dtype in product(models, dtypes) for launch in launches(model, dtype)])
    _work[:] = product(written, targets, warps)
    # forked, because a kernel cannot be sent to a process that was started otherwise
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_compile, range(len(_work)), chunksize=4)


def _compile(place: int):
    from ops.ahead import compile

    return compile(*_work[place])


def parse(argv: list[str] | None) -> argparse.Namespace:
    from ops.ahead import TARGETS
    from ops.launching import WARPS

    parser = argparse.ArgumentParser(prog="python -m zoo.kernels", description="Compile the kernels of models.")
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--warps", nargs="+", type=int, default=list(WARPS))
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--out", type=Path, help="a folder for kernels.md")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.models) - set(variants()))
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}: expected some of {', '.join(variants())}")
    args.models = args.models or list(variants())
    return args


def main(argv: list[str] | None = None) -> None:
    from ops.ahead import table

    args = parse(argv)
    costs = compile_models(args.models, args.targets, args.dtypes, args.warps, args.jobs)
    text = "\n".join(["# Kernels, compiled ahead of time", "", *_facts(args.models), "", table(costs), ""])
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.md").write_text(text)
    over = [cost for cost in costs if not cost.fits]
    if over:
        sys.exit(f"{len(over)} binaries need more shared memory than their target has, the first: {over[0]}")


def _facts(models: Sequence[str]) -> list[str]:
    import triton

    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- versions: torch {torch.__version__}, triton {triton.__version__}",
        f"- command: python -m zoo.kernels {' '.join(sys.argv[1:])}",
        f"- models: {', '.join(models)}",
        "",
        "Each row is the worst over its binaries, which differ in dtype, window, channels of a head and the like.",
    ]


if __name__ == "__main__":
    main()
