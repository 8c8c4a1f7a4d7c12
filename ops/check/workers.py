"""Processes that check and compile, each of which may die or lose its GPU without ending the run."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from ..tool import end_with

DIED = "its process died: killed, perhaps for memory, or crashed"
LOST = "not run: after an earlier error no CUDA call of this process succeeds"


def context_lost() -> bool:
    """Whether an error in a kernel has left this process without a usable GPU."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


@contextmanager
def workers(jobs: int, begin: Callable, *given: Any) -> Iterator[Callable]:
    """Yields run(function, items, died), which is `map` over `jobs` processes that begin with `begin(*given)`.

    Each process is a pool of its own, so that it is known what it worked on when it died: the answer for that item is
    died(item). A process that died or lost its GPU is replaced.
    """
    # a process that has initialised CUDA cannot be forked
    context, idle = multiprocessing.get_context("spawn"), SimpleQueue()

    def process() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, context, _begin, (os.getpid(), begin, given))

    def answer(function: Callable, item: Any, died: Callable) -> Any:
        own, lost = idle.get(), True
        try:
            found, lost = own.submit(_with_state, function, item).result()
        except BrokenProcessPool:
            found = died(item)
        finally:
            if lost:
                own.shutdown()
            idle.put(process() if lost else own)
        return found

    def run(function: Callable, items: Sequence, died: Callable) -> Iterator:
        return threads.map(lambda item: answer(function, item, died), items)

    for _ in range(jobs):
        idle.put(process())
    threads = ThreadPoolExecutor(jobs)
    try:
        yield run
    finally:
        threads.shutdown(cancel_futures=True)
        for _ in range(jobs):
            idle.get().shutdown()


def _begin(parent: int, begin: Callable, given: tuple[Any, ...]) -> None:
    end_with(parent)
    begin(*given)


def _with_state(function: Callable, item: Any) -> tuple[Any, bool]:
    return function(item), context_lost()
