"""Compiling in several processes what is to be timed, since most of the time of a run would go into that."""

import argparse
import multiprocessing
import os
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


def prepare(jobs: list[Job], args: argparse.Namespace) -> None:
    """Compiles in several processes what the jobs need, so that afterwards all is found on disk."""
    # a process that has begun to use a GPU cannot be forked
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), alone) as pool:
        for _ in pool.map(partial(warm, args=args), jobs):
            pass


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
