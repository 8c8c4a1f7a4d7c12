"""Checks every op on this machine.

    python -m ops.check --device cuda --jobs 8         # kernels in three precisions, memory, graphs: minutes
    python -m ops.check --device cpu                   # the fast path of CPUs
    python -m ops.check --device cpu --interpret       # the kernels too, in Triton's interpreter: slow

The result and every gradient of each case are compared with the reference in float64, on a GPU in each configuration
that the tuner may choose. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its imports must not run before --interpret is parsed
    from .cases import Case

DTYPES = ("float32", "float16", "bfloat16")
FLOAT32 = ("ieee", "tf32", "tf32x3")  # ways in which a GPU multiplies float32


@dataclass
class Finding:
    """The outcome of one check of one op: whether it passed, and what it found, in words."""

    check: str
    op: str
    ok: bool
    found: str


def positive(text: str) -> int:
    """An option's number, from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ops.check", description="Checks every op against its reference.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--interpret", action="store_true", help="on the CPU: kernels too, in Triton's interpreter")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--float32", choices=FLOAT32, default="ieee", help="on a GPU: how float32 is multiplied")
    parser.add_argument("--cases", default="", help="only cases whose name, <op>-<name>, contains this")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that compile and compare; default: 1")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    args = parser.parse_args(argv)
    if args.device == "cpu" and args.float32 != "ieee":
        parser.error(f"--float32 {args.float32}: only a GPU multiplies so, --device cuda")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so set before they are imported
    import torch

    from ..bench.report import circumstances

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here")
    if not grouped(args, "torch"):
        sys.exit(f"--cases {args.cases}: no case has this in its name, <op>-<name>")
    if args.device == "cuda":
        multiply(args.float32)
    began, findings = time.perf_counter(), []
    with workers(args.jobs) as run:
        groups = tasks(args)
        # other processes work on these while this one runs the machine checks
        answers = run(shares_of, [task for some in groups.values() for task in some])
        for finding in chain(machine(args), verdicts(groups, answers)):
            findings.append(finding)
            mark = "ok    " if finding.ok else "FAILED"
            print(f"{mark}  {finding.check:<17} {finding.op:<22} {finding.found}", flush=True)
    failed = [finding for finding in findings if not finding.ok]
    facts = circumstances(args.device, "ops.check") | {"seconds": str(round(time.perf_counter() - began))}
    print("\n" + "\n".join(f"{key}: {value}" for key, value in facts.items()))
    print(f"{len(findings) - len(failed)} checks passed, {len(failed)} failed")
    if args.json is not None:
        args.json.write_text(json.dumps({**facts, "findings": [asdict(f) for f in findings]}, indent=1) + "\n")
    return 1 if failed else 0


@dataclass(frozen=True)
class Task:
    """One case in one implementation and dtype; kernels in their first `places` configurations."""

    case: str
    impl: str
    dtype: str
    device: str
    places: int = 1
    float32: str = "ieee"


def most(dtype: str, float32: str) -> int:
    """The most configurations that a kernel has."""
    return 1 if dtype == "float32" and float32 != "tf32x3" else 4


def multiply(float32: str) -> None:
    from ..launching import multiply_float32

    multiply_float32(float32)


def tasks(args: argparse.Namespace) -> dict[tuple[str, str], list[Task]]:
    """The tasks that check the error bound, by (implementation and dtype, op)."""
    groups = {}
    for impl in ["triton"] * (args.device == "cuda" or args.interpret) + ["torch"]:
        # the interpreter's bfloat16 matmuls are wrong
        dtypes = [name for name in args.dtypes if not (args.interpret and impl == "triton" and name == "bfloat16")]
        for op, cases in grouped(args, impl).items():
            for dtype in dtypes:
                places = most(dtype, args.float32) if impl == "triton" and args.device == "cuda" else 1
                options = (impl, dtype, args.device, places, args.float32)
                groups[f"{impl} {dtype}", op] = [Task(str(case), *options) for case in cases]
    return groups


def verdicts(groups: dict[tuple[str, str], list[Task]], answers: Iterator[list]) -> Iterator[Finding]:
    """One finding for each implementation, dtype and op, from the answers to their tasks in this order."""
    for (check, op), some in groups.items():
        yield verdict(check, op, {task: next(answers) for task in some})


@contextmanager
def workers(jobs: int) -> Iterator[Callable]:
    """`map` over `jobs` processes."""
    if jobs == 1:
        yield map
        return
    # a process that has initialised CUDA cannot be forked
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), share_cores, (jobs,)) as pool:
        yield pool.map


def share_cores(jobs: int) -> None:
    import torch

    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))


def shares_of(task: Task) -> list[dict[str, float] | str]:
    """For each configuration, the shares of the allowed error, or how the implementation failed."""
    import torch

    from ..bench.measure import told
    from ..launching import configuration
    from .bound import ErrorBound
    from .tables import BY_NAME

    if task.device == "cuda":
        multiply(task.float32)  # this may be another process
    held, found = None, []
    for place in range(task.places):
        try:
            held = held or ErrorBound(BY_NAME[task.case], getattr(torch, task.dtype), task.device)
            with configuration(place):
                found.append(held.shares(task.impl))
        except Exception as error:  # a kernel may fail in any way, and the others are still checked
            found.append(told(error))
    return found


def verdict(check: str, op: str, answers: dict[Task, list[dict[str, float] | str]]) -> Finding:
    """The largest share of the allowed error over the cases of an op, or the cases that exceed it."""
    from .bound import broken

    worst, bad = 0.0, []
    for task, answered in answers.items():
        for place, found in enumerate(answered):
            name = f"{task.case} in configuration {place + 1}" if place else task.case
            wrong = found if isinstance(found, str) else broken(found)
            bad += [f"{name}: {wrong}"] * bool(wrong)
            worst = max(worst, *([] if isinstance(found, str) else found.values()), 0.0)
    cases = len({task.case for task in answers})
    return Finding(check, op, not bad, "; ".join(bad) or f"{cases} cases, at most {worst:.2f} of the allowed error")


def grouped(args: argparse.Namespace, impl: str) -> dict[str, list[Case]]:
    """The requested cases, by op."""
    from .tables import CASES, EXTREME, RELEASED, with_kernels

    found: dict[str, list[Case]] = {}
    for case in (*CASES, *RELEASED, *EXTREME):
        if args.cases in str(case) and (impl != "triton" or with_kernels(case)):
            found.setdefault(case.op, []).append(case)
    return found


def machine(args: argparse.Namespace) -> Iterator[Finding]:
    """All checks other than the error bound."""
    from . import machine as checks

    on_gpu = args.device == "cuda"
    if on_gpu or args.interpret:
        for check in (checks.same_bits, checks.compiled, *[checks.captured] * on_gpu):
            for op, cases in grouped(args, "triton").items():
                yield tried(check.__name__, op, lambda check=check, case=cases[0]: check(case, args.device))
        for check in (
            checks.forward_memory,
            checks.packed_gradients,
            checks.ranked,
            checks.far_apart,
            *[checks.large_map, checks.routed_memory] * on_gpu,
        ):
            yield tried(check.__name__, "several", lambda check=check: check(args.device))
    yield tried("plain_attention", "pooled_attention", lambda: checks.plain_attention(args.device))


def tried(name: str, op: str, check: Callable[[], str]) -> Finding:
    from ..bench.measure import told

    try:
        return Finding(name, op, True, check())
    except Exception as error:  # as above
        return Finding(name, op, False, told(error))
