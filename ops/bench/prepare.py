"""Compiles what is to be timed in several processes, since a run would otherwise spend most of its time on that."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch

from ..check.workers import DIED, workers
from ..precision import multiply_float32
from .contest import COMPILED
from .contests import CONTESTS
from .jobs import Job, asked
from .measure import answer, attempt


def prepared(jobs: list[Job], args: argparse.Namespace, end: float | None = None) -> Iterator[Job]:
    """Yields the jobs in order; what the next ones need is first compiled in several processes and then found on disk.

    It compiles for as many jobs at a time as there are processes, and never while one is timed, so that an interrupted
    run has measured what it compiled. From `end` on, on the clock `time.monotonic`, it compiles for no more jobs.
    """
    if args.jobs is None or args.device != "cuda":
        yield from jobs
        return
    with workers(args.jobs, alone) as run:
        for i in range(0, len(jobs), args.jobs):
            if end is not None and time.monotonic() > end:
                return
            some = jobs[i : i + args.jobs]
            for _ in run(partial(warm, args=args), some, died):
                pass
            yield from some


def died(job: Job) -> None:
    print(f"{job.call.op} {job.call}: not compiled ahead, {DIED}", flush=True)


def alone() -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes already share the cores


def warm(job: Job, args: argparse.Namespace) -> None:
    """Runs ours in all configurations, without tuning, and each compiled peer once."""
    from ..launching import configuration, most  # needs triton, which is not everywhere where ops are timed

    multiply_float32(args.float32)
    dtype, op = getattr(torch, job.dtype), CONTESTS[job.call.op]
    for mode in args.modes:
        with suppress(Exception):  # the timed run will raise and report it
            contest = op(job.call, job.batch, args.device, dtype)
            if mode != "forward" and not contest.learned:
                continue
            peers = contest.all_peers(args.device)
            for place in range(most(dtype, args.float32)):
                with configuration(place):
                    answer(peers["ours"], contest, mode)
            for name in COMPILED:
                if name in peers and asked(job, args, name):
                    attempt(peers[name], contest, mode, dtype, {})
        with suppress(Exception):  # as after an illegal access, which leaves no GPU to this process
            torch.compiler.reset()
            torch.cuda.empty_cache()
