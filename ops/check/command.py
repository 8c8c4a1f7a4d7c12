"""Check every op on this machine, by one command.

    python -m ops.check --device cuda                  # kernels in three precisions, memory, graphs: minutes
    python -m ops.check --device cpu                   # the fast path of CPUs
    python -m ops.check --device cpu --interpret       # the kernels too, by Triton's interpreter: slowly

Each case is compared with its reference in float64, the result and every gradient. The exit code is 1 where something
is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what it imports must not come before --interpret is read
    from .cases import Case

DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class Finding:
    """What one check of one op found: in words, and whether it is as it should be."""

    check: str
    op: str
    ok: bool
    found: str


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ops.check", description="Every op against its reference.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--interpret", action="store_true", help="on the CPU: kernels too, by Triton's interpreter")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", default="", help="only cases whose name contains this, <op>-<name>")
    parser.add_argument("--json", type=Path, help="a file for what was found")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, so before they are imported
    import torch

    from ..bench.report import circumstances

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here")
    began, findings = time.perf_counter(), []
    for finding in (*laws(args), *machine(args)):
        findings.append(finding)
        mark = "ok    " if finding.ok else "FAILED"
        print(f"{mark}  {finding.check:<17} {finding.op:<22} {finding.found}", flush=True)
    failed = [finding for finding in findings if not finding.ok]
    facts = circumstances(args.device, "ops.check") | {"seconds": str(round(time.perf_counter() - began))}
    print("\n" + "\n".join(f"{key}: {value}" for key, value in facts.items()))
    print(f"{len(findings) - len(failed)} checks as they should be, {len(failed)} not")
    if args.json is not None:
        args.json.write_text(json.dumps({**facts, "findings": [asdict(f) for f in findings]}, indent=1) + "\n")
    return 1 if failed else 0


def laws(args: argparse.Namespace) -> Iterator[Finding]:
    """One finding for each implementation, op and dtype."""
    for impl in ["torch"] + ["triton"] * (args.device == "cuda" or args.interpret):
        # the interpreter multiplies bfloat16 wrongly
        dtypes = [name for name in args.dtypes if not (args.interpret and impl == "triton" and name == "bfloat16")]
        for op, cases in grouped(args, impl).items():
            for dtype in dtypes:
                yield law(op, cases, impl, dtype, args.device)


def law(op: str, cases: list[Case], impl: str, dtype: str, device: str) -> Finding:
    """The largest share of the allowed error over the cases of an op, or those that break the law."""
    import torch

    from .law import broken, shares

    worst, bad = 0.0, []
    for case in cases:
        try:
            found = shares(case, impl, getattr(torch, dtype), device)
        except Exception as error:  # a kernel may fail in any way, and the others are to be checked too
            bad.append(f"{case}: {first_line(error)}")
            continue
        bad += [f"{case}: {broken(found)}"] * bool(broken(found))
        worst = max(worst, *found.values())
    text = "; ".join(bad) or f"{len(cases)} cases, at most {worst:.2f} of the allowed error"
    return Finding(f"{impl} {dtype}", op, not bad, text)


def grouped(args: argparse.Namespace, impl: str) -> dict[str, list[Case]]:
    """The cases that are asked for, by op."""
    from .tables import CASES, EXTREME, RELEASED, with_kernels

    found: dict[str, list[Case]] = {}
    for case in (*CASES, *RELEASED, *EXTREME):
        if args.cases in str(case) and (impl != "triton" or with_kernels(case)):
            found.setdefault(case.op, []).append(case)
    return found


def machine(args: argparse.Namespace) -> Iterator[Finding]:
    """What is checked beyond the law."""
    from . import machine as checks

    on_gpu = args.device == "cuda"
    if on_gpu or args.interpret:
        for check in (checks.same_bits, checks.compiled, *[checks.captured] * on_gpu):
            for op, cases in grouped(args, "triton").items():
                yield tried(check.__name__, op, lambda check=check, case=cases[0]: check(case, args.device))
        for check in (checks.forward_memory, checks.far_apart, *[checks.large_map, checks.routed_memory] * on_gpu):
            yield tried(check.__name__, "several", lambda check=check: check(args.device))
    yield tried("plain_attention", "pooled_attention", lambda: checks.plain_attention(args.device))


def tried(name: str, op: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, op, True, check())
    except Exception as error:  # as above
        return Finding(name, op, False, first_line(error))


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
