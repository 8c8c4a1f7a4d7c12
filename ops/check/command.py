"""Checks every op on this machine.

    python -m ops.check --device cuda --jobs 8         # kernels in three precisions, memory, graphs: minutes
    python -m ops.check --device cpu                   # the fast path of CPUs
    python -m ops.check --device cpu --interpret       # the kernels too, in Triton's interpreter: slow

The result and every gradient of each case are compared with the reference in float64, on a GPU in each configuration
that the tuner may choose: the first of every case, then the PyTorch paths, then the others. Findings are written after
each check. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch

from ..dispatch import SharedMemoryError
from ..precision import HOW, multiply_float32
from ..tool import ToolError, amount, overwrite, positive, tool
from .bound import ErrorBound, broken
from .cases import Case
from .tables import BY_NAME, with_kernels
from .workers import DIED, LOST, context_lost, workers

# What imports kernels (launching, and bench for its measurements) is imported where it is used, after --interpret is
# parsed: whether a kernel is interpreted is decided when it is defined.

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Finding:
    """The outcome of one check of one op: whether it passed, and what it found, in words.

    A kernel that refuses to run on a GPU with too little shared memory passes.
    """

    check: str
    op: str
    ok: bool
    found: str


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ops.check", description="Checks every op against its reference.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--interpret", action="store_true", help="on the CPU: kernels too, in Triton's interpreter")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--float32", choices=HOW, default="ieee", help="on a GPU: how float32 is multiplied")
    parser.add_argument("--cases", default="", help="only cases whose name, <op>-<name>, contains this")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that compile and compare; default: 1")
    parser.add_argument("--minutes", type=amount, help="start no check after this many minutes; default: no limit")
    parser.add_argument("--json", type=Path, help="write the findings to this file, after each check")
    args = parser.parse_args(argv)
    if args.device == "cpu" and args.float32 != "ieee":
        parser.error(f"--float32 {args.float32}: only a GPU multiplies so, --device cuda")
    return args


@tool
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    from ..bench.report import circumstances

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ToolError("--device cuda: torch finds no GPU here")
    if not grouped(args, "torch"):
        raise ToolError(f"--cases {args.cases}: no case has this in its name, <op>-<name>")
    if args.device == "cuda":
        multiply_float32(args.float32)
    began, findings, facts = time.time(), [], circumstances(args.device, "ops.check")

    def write() -> None:
        facts["seconds"] = str(round(time.time() - began))
        if args.json is not None:
            content = {**facts, "findings": [asdict(finding) for finding in findings]}
            overwrite(args.json, json.dumps(content, indent=1) + "\n")

    write()  # a folder that does not exist is an error now, not after minutes
    end = None if args.minutes is None else began + 60 * args.minutes
    groups, skipped = tasks(args, end), 0
    with mapped(args.jobs) as run:
        # other processes work on these while this one runs the machine checks
        answers = run(shares_of, [task for some in groups.values() for task in some], died)
        for finding in chain(machine(args, end), verdicts(groups, answers)):
            if finding is None:
                skipped += 1
                continue
            findings.append(finding)
            write()
            mark = "ok    " if finding.ok else "FAILED"
            print(f"{mark}  {finding.check:<19} {finding.op:<22} {finding.found}", flush=True)
    failed = [finding for finding in findings if not finding.ok]
    if skipped:
        facts["not run"] = f"{skipped} of {len(findings) + skipped} checks, as --minutes {args.minutes:g} were over"
    write()
    print("\n" + "\n".join(f"{key}: {value}" for key, value in facts.items()))
    print(f"{len(findings) - len(failed)} checks passed, {len(failed)} failed")
    return 1 if failed else 0


@dataclass(frozen=True)
class Task:
    """One case in one implementation and dtype.

    places  which configurations of its kernels
    end     the time, in seconds since the epoch, from which it is not started
    """

    case: str
    impl: str
    dtype: str
    device: str
    places: tuple[int, ...] = (0,)
    float32: str = "ieee"
    end: float | None = None


def tasks(args: argparse.Namespace, end: float | None = None) -> dict[tuple[str, str], list[Task]]:
    """The tasks that check the error bound, by the name of the check and the op, the most important first."""
    on_gpu, groups = args.device == "cuda", {}
    rounds = [("triton", False)] * (on_gpu or args.interpret) + [("torch", False)] + [("triton", True)] * on_gpu
    for impl, later in rounds:
        for dtype in args.dtypes:
            if args.interpret and impl == "triton" and dtype == "bfloat16":
                continue  # the interpreter's bfloat16 matmuls are wrong
            places = later_places(dtype, args.float32) if later else (0,)
            if not places:
                continue
            check = f"{impl} {dtype}" + f" 2-{places[-1] + 1}" * later
            for op, cases in grouped(args, impl).items():
                options = (impl, dtype, args.device, places, args.float32, end)
                groups[check, op] = [Task(str(case), *options) for case in cases]
    return groups


def later_places(dtype: str, float32: str) -> tuple[int, ...]:
    """The numbers of the configurations besides the first that kernels have for a dtype."""
    from ..launching import most

    return tuple(range(1, most(getattr(torch, dtype), float32)))


@contextmanager
def mapped(jobs: int) -> Iterator[Callable]:
    """run(function, tasks, died): `map`, over `jobs` processes if they are several."""
    if jobs == 1:
        yield lambda function, some, died: map(function, some)
        return
    with workers(jobs, share_cores, jobs) as run:
        yield run


def share_cores(jobs: int) -> None:
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))


Answer = list[dict[str, float] | str] | str | None  # what `shares_of` returns


def shares_of(task: Task) -> Answer:
    """For each configuration, the shares of the allowed error, or how the implementation failed; None: not run.

    Where the GPU has too little shared memory for a kernel, which then refuses to run: how it says so.
    """
    from ..bench.measure import told

    if task.end is not None and time.time() > task.end:
        return None
    if task.device == "cuda":
        multiply_float32(task.float32)  # this may be another process
    held, found = None, []
    for place in task.places:
        if context_lost():
            found.append(LOST)
            continue
        try:
            held = held or ErrorBound(BY_NAME[task.case], getattr(torch, task.dtype), task.device)
            with configured(task.impl, place):
                found.append(held.shares(task.impl))
        except SharedMemoryError as error:
            return str(error)
        except Exception as error:  # a kernel may fail in any way, and the others are still checked
            found.append(told(error))
    return found


def configured(impl: str, place: int) -> AbstractContextManager[None]:
    """Context in which kernels, if the implementation has them, run in their configuration number `place`."""
    if impl != "triton":
        return nullcontext()
    from ..launching import configuration

    return configuration(place)


def died(task: Task) -> Answer:
    return [DIED] * len(task.places)


def verdicts(groups: dict[tuple[str, str], list[Task]], answers: Iterator[Answer]) -> Iterator[Finding | None]:
    """One finding for each group, from the answers to the tasks in this order; None if none of its tasks was run."""
    for (check, op), some in groups.items():
        found = {task: next(answers) for task in some}
        run = {task: answered for task, answered in found.items() if answered is not None}
        yield verdict(check, op, run, len(some)) if run else None


def verdict(check: str, op: str, answers: dict[Task, list[dict[str, float] | str] | str], asked: int) -> Finding:
    """The largest share of the allowed error over the cases of an op, or the cases that exceed it.

    asked  the number of cases, of which some may not have been run, or been refused
    """
    worst, bad = 0.0, []
    refused = [answered for answered in answers.values() if isinstance(answered, str)]
    compared = {task: answered for task, answered in answers.items() if not isinstance(answered, str)}
    for task, answered in compared.items():
        for place, found in zip(task.places, answered, strict=True):
            name = f"{task.case} in configuration {place + 1}" if place else task.case
            wrong = found if isinstance(found, str) else broken(found)
            bad += [f"{name}: {wrong}"] * bool(wrong)
            worst = max(worst, *([] if isinstance(found, str) else found.values()), 0.0)
    cases = f"{asked}" if len(compared) == asked else f"{len(compared)} of {asked}"
    told = "; ".join(bad) or f"{cases} cases, at most {worst:.2f} of the allowed error"
    return Finding(check, op, not bad, "; refused: ".join([told, *dict.fromkeys(refused)]))


def grouped(args: argparse.Namespace, impl: str) -> dict[str, list[Case]]:
    """The requested cases, by op."""
    found: dict[str, list[Case]] = {}
    for case in BY_NAME.values():
        if args.cases in str(case) and (impl != "triton" or with_kernels(case)):
            found.setdefault(case.op, []).append(case)
    return found


def machine(args: argparse.Namespace, end: float | None = None) -> Iterator[Finding | None]:
    """All checks other than the error bound; None for each that is not run because time is over."""
    from . import machine as checks

    on_gpu = args.device == "cuda"
    asked: list[tuple[Callable, str, tuple]] = []
    if on_gpu or args.interpret:
        for check in (checks.same_bits, checks.compiled, *[checks.captured] * on_gpu):
            asked += [(check, op, (cases[0], args.device)) for op, cases in grouped(args, "triton").items()]
        for check in (
            checks.forward_memory,
            checks.packed_gradients,
            checks.ranked,
            checks.far_apart,
            *[checks.large_map, checks.routed_memory] * on_gpu,
        ):
            asked.append((check, "several", (args.device,)))
    asked.append((checks.plain_attention, "pooled_attention", (args.device,)))
    for check, op, given in asked:
        over = end is not None and time.time() > end
        yield None if over else tried(check, op, *given)


def tried(check: Callable[..., str], op: str, *given: object) -> Finding:
    from ..bench.measure import told

    if context_lost():
        return Finding(check.__name__, op, False, LOST)
    try:
        return Finding(check.__name__, op, True, check(*given))
    except SharedMemoryError as error:
        return Finding(check.__name__, op, True, f"refused: {error}")
    except Exception as error:  # a check may fail in any way, and the others are still made
        return Finding(check.__name__, op, False, told(error))
