"""Times each op beside its peers, on the calls that the models make, in one run.

    python -m ops.bench --device cuda --minutes 25 --jobs 8           # everything, the most important first
    python -m ops.bench window_attention --device cpu --batch 2       # one op

Before anything is timed, all peers must agree in results and gradients. Timings alternate between the peers and are
medians, so that a busy moment of the machine affects all of them. Results are written after every call, so that an
interrupted run keeps what it measured. A peer that fails or runs out of memory is listed with the reason; if ours does,
the run continues and ends with an error.
"""

import argparse
import importlib.util
import sys
import time
from functools import partial
from pathlib import Path

import torch

from ..check.workers import context_lost
from ..precision import HOW, multiply_float32
from ..tool import ToolError, amount, count, overwrite, positive, tool, writable
from .cases import MODELS, SMALL
from .contests import CONTESTS
from .jobs import Job, asked, plan, sides
from .measure import MODES, Machine, Row, machine, measure, told
from .prepare import prepared
from .report import chart, circumstances, numbers, write

BATCHES = {"224": 128, "800x1344": 2}  # by image size; on a CPU 8 and 1
DTYPES = ("bfloat16", "float32", "float16")


def run(job: Job, args: argparse.Namespace) -> list[Row]:
    """The rows of a job, one per mode; a failure outside the peers is reported in the row."""
    dtype, rows = getattr(torch, job.dtype), []
    for mode in args.modes:
        torch.manual_seed(0)
        row = Row(job.call.op, str(job.call), list(job.stages), job.image, job.batch, job.dtype, mode)
        try:
            contest = CONTESTS[job.call.op](job.call, job.batch, args.device, dtype)
            if mode == "forward" or contest.learned:
                options = {"repeats": args.repeats, "device": args.device, "dtype": dtype}
                options["asked"] = partial(asked, job, args)
                rows.append(measure(job.call, contest, row, **options))
        except Exception as error:  # such as inputs that do not fit in memory; other calls may still be measured
            row.missing["ours"] = told(error)
            rows.append(row)
        # what was compiled for these shapes is not used for others
        torch.compiler.reset()
        if context_lost():
            break
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ops.bench", description="Times ops beside their peers.")
    parser.add_argument("ops", nargs="*", help=f"default: all of {' '.join(CONTESTS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", help="whose calls to time; default: T and B of each family, on a CPU T")
    parser.add_argument("--images", nargs="+", help="image sizes; default: 224 and 800x1344, on a CPU 224")
    parser.add_argument(
        "--batches", "--batch", nargs="+", type=positive, help="of each size; default: 128 2, on a CPU 8 1"
    )
    parser.add_argument(
        "--dtypes", "--dtype", nargs="+", choices=DTYPES, help="default: bfloat16 float32, on a CPU float32"
    )
    parser.add_argument("--float32", choices=HOW, default="ieee", help="on a GPU: how float32 is multiplied")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--peers", nargs="*", help="only these besides ours; default: all")
    parser.add_argument(
        "--compiled", type=count, help="compiled peers in this many calls per op, at the first size only"
    )
    parser.add_argument(
        "--jobs", type=positive, help="on a GPU: processes that compile for as many calls before these are timed"
    )
    parser.add_argument("--cases", default="", help="only calls whose name contains this")
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument(
        "--minutes",
        type=amount,
        help="start no further call after this many minutes, including compilation; default: no limit",
    )
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file, after each call")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks"), help="folder for ops_<device>.md, .json and .png"
    )
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    args.ops = args.ops or list(CONTESTS)
    args.models = args.models or list(SMALL if cpu else MODELS)
    args.images = args.images or (["224"] if cpu else list(BATCHES))
    batches = {"224": 8, "800x1344": 1} if cpu else BATCHES
    args.batches = args.batches or [batches.get(image, 1) for image in args.images]
    args.dtypes = args.dtypes or (["float32"] if cpu else ["bfloat16", "float32"])
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for what, given, known in (("op", args.ops, CONTESTS), ("model", args.models, MODELS)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"no {what} is called {', '.join(unknown)}: expected some of {', '.join(known)}")
    if args.device == "cpu" and args.float32 != "ieee":
        parser.error(f"--float32 {args.float32}: only a GPU multiplies so, --device cuda")
    if len(args.batches) != len(args.images):
        parser.error(f"--batches has {len(args.batches)} numbers for {len(args.images)} images: expected one each")
    try:
        for image in args.images:
            sides(image)
    except ValueError as error:
        parser.error(f"--images: {error}")


@tool
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ToolError("--device cuda: torch finds no GPU here")
    if importlib.util.find_spec("matplotlib") is None:
        raise ToolError("the chart needs matplotlib, which is not installed: pip install matplotlib")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        multiply_float32(args.float32)
    jobs = plan(args)
    if not jobs:
        calls = f"of {' '.join(args.ops)} in {' '.join(args.models)}"
        named = f"no call has this in its name (--cases {args.cases}, {calls})"
        raise ToolError(f"nothing to time: {named if args.cases else f'there are no calls {calls}'}")
    writable(args.out, args.json)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    rows, machines = [], {}
    stem = ("ops" if len(args.ops) == len(CONTESTS) else "-".join(args.ops)) + f"_{args.device}"
    stem += f"_{args.float32}" * (args.float32 != "ieee")
    done = 0
    for job in prepared(jobs, args, end):
        if end is not None and time.monotonic() > end:
            break
        if job.dtype not in machines:
            machines[job.dtype] = reached(args, job.dtype)
        made = run(job, args)
        rows, done = rows + made, done + 1
        facts = settings(args, done, len(jobs))
        write(args.out / stem, rows, facts, machines)
        if args.json is not None:
            overwrite(args.json, numbers(rows, facts, machines))
        for row in made:
            print(f"{row.op} {row.call} {row.image} {row.dtype} {row.mode}: {said(row)}", flush=True)
        if context_lost():
            print("stopped: after an error in that call no CUDA call of this process succeeds", flush=True)
            break
    finish(args, stem, rows, settings(args, done, len(jobs)), machines)


def reached(args: argparse.Namespace, dtype: str) -> Machine | None:
    """What the machine reaches in a dtype; None, with the reason printed, if that cannot be measured."""
    try:
        return machine(args.device, getattr(torch, dtype), args.repeats)
    except Exception as error:  # such as too little memory: the calls may still be measured
        print(f"copy and matmul in {dtype} were not timed: {told(error)}", flush=True)
        return None


def said(row: Row) -> str:
    timed = ", ".join(f"{name} {ms:.3g} ms" for name, ms in row.ms.items())
    return timed + "".join(f"; {name} not timed: {why}" for name, why in row.missing.items())


def settings(args: argparse.Namespace, done: int, asked: int) -> dict[str, str]:
    timing = f"medians of {args.repeats} alternating runs; {done} of {asked} calls"
    return circumstances(args.device, "ops.bench") | {"settings": timing}


def finish(
    args: argparse.Namespace, stem: str, rows: list[Row], facts: dict[str, str], machines: dict[str, Machine | None]
) -> None:
    if args.json is not None and not rows:
        overwrite(args.json, numbers(rows, facts, machines))
    timed = {name for row in rows for name in (*row.ms, *row.missing)}
    if rows and (unknown := sorted(set(args.peers or ()) - timed)):
        print(f"--peers: no call has {', '.join(unknown)}; without it all peers are timed", file=sys.stderr)
    if rows:
        chart(args.out / f"{stem}.png", rows, facts["device"])
    failed = [
        f"{row.op} {row.call} {row.dtype} {row.mode}: {row.missing['ours']}" for row in rows if "ours" in row.missing
    ]
    if failed:
        sys.exit("\n".join(["ours was not timed in:", *failed]))
