"""Compiling in several processes what is to be timed, since most of the time of a run would go into that."""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from ..check.command import PLACES
from ..launching import configuration
from .contest import COMPILED
from .contests import CONTESTS
from .jobs import Job, asked
from .measure import answer, attempt


def prepared(jobs: list[Job], args: argparse.Namespace) -> Iterator[Job]:
    """The jobs in their order; what the next of them need is compiled in several processes, and then found on disk.

    As many are next as there are processes, and nothing is compiled while one is timed: a run that is cut off has
    measured what it compiled.
    """
    if args.jobs is None or args.device != "cuda":
        yield from jobs
        return
    # a process that has begun to use a GPU cannot be forked
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), alone) as pool:
        for i in range(0, len(jobs), args.jobs):
            some = jobs[i : i + args.jobs]
            for _ in pool.map(partial(warm, args=args), some):
                pass
            yield from some


def alone() -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes share the cores as it is


def warm(job: Job, args: argparse.Namespace) -> None:
    """Runs ours in all configurations, none measured, and once the peers that are compiled."""
    dtype, op = getattr(torch, job.dtype), CONTESTS[job.call.op]
    for mode in args.modes:
        with suppress(Exception):  # the timed run meets and tells it again
            contest = op(job.call, job.batch, args.device, dtype)
            if mode != "forward" and not contest.learned:
                continue
            peers = contest.all_peers(args.device)
            for place in range(PLACES[job.dtype]):
                with configuration(place):
                    answer(peers["ours"], contest, mode)
            for name in COMPILED:
                if name in peers and asked(job, args, name):
                    attempt(peers[name], contest, mode, dtype, {})
        torch.compiler.reset()
        torch.cuda.empty_cache()
