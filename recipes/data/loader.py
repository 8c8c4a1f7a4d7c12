"""Batches of a source: seeded order, exact resumption, worker processes.

A source that is read by index has a permutation for each epoch, and any number of workers and ranks gives the same
batches. A source in shards is read sequentially, in the order that `recipes.data.stream_order` describes.
"""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from recipes.console import note
from recipes.data.errors import DataError
from recipes.data.seeding import Stream, preserved, seed_of
from recipes.data.shards import Shards
from recipes.data.source import Replaced, Source
from recipes.data.stream_order import Batch, Streamed, StreamOrder
from zoo.allocator import give_freed_memory_back

# those that stop a run, see `recipes.stop`
HELD = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
NO_SHM = ("unable to allocate shared memory", "unable to write to file </torch_")  # how torch's errors begin
MORE_SHM = "give the container a larger one (docker run --shm-size=8g), or set data.workers=0"
TINY = 5_000  # number of images below which worker processes are not worth their cost


def worker_count(source: Source, workers: int | None = None) -> int:
    """`workers` if given; else the cores of this rank minus one, at most 4, and none for a tiny set."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if len(source) < TINY else max(0, min(4, cores - 1))


def batches_per_epoch(source: Source, batch_size: int, world: int = 1) -> int:
    """Full training batches of one rank in an epoch; images that are repeated do not lengthen it.

    Raises DataError if the source does not fill one batch on every rank.
    """
    count = len(source) // (batch_size * world)
    if count == 0:
        raise DataError(
            f"{source.name} has {len(source)} images, fewer than one batch of {batch_size * world}: "
            f"set data.batch_size= to at most {len(source)}"
        )
    return count


@lru_cache(maxsize=1)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the indices of an epoch of `count` images, int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(Stream.ORDER, seed, epoch))).numpy()


@dataclass(frozen=True, eq=False)
class Planned(Sequence[Batch]):
    """The batches of one rank in an epoch that is read by index, each made when it is asked for.

    The samples of an epoch are its permutation, each index `repeats` times in a row. The n `micro_batches` of a step
    share its samples: each takes a slice; of repeated images each takes every n-th, so that copies lie in several.

    numbers  of the micro-batches, counted over all ranks
    """

    order: np.ndarray
    epoch: int
    numbers: range
    size: int
    micro_batches: int
    repeats: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int | slice) -> Batch | Planned:
        if isinstance(place, slice):
            return replace(self, numbers=self.numbers[place])
        size, count = self.size, self.micro_batches
        step, turn = divmod(self.numbers[place], count)
        shared = range(step * count * size, (step + 1) * count * size)
        chosen = shared[turn * size : (turn + 1) * size] if self.repeats == 1 else shared[turn::count]
        found = [divmod(sample, self.repeats) for sample in chosen]
        return Batch([(int(self.order[image]), self.epoch, copy) for image, copy in found])


def stream_order_of(
    source: Source, *, batch_size: int, seed: int, workers: int | None, world: int = 1, repeats: int = 1
) -> StreamOrder | None:
    """The order in which a source in shards is read; None for one that is read by index."""
    if not isinstance(source.records, Shards):
        return None
    records, readers = source.records, max(1, worker_count(source, workers))
    batches_per_epoch(source, batch_size, world)
    counts = tuple(records.counts.tolist())
    return StreamOrder(counts, records.buffer, seed, world, readers, batch_size, repeats)


def plan_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    train: bool,
    start: int = 0,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
    repeats: int = 1,
    micro_batches: int | None = None,
) -> Sequence[Batch]:
    """What `batches` yields, as indices; nothing is read.

    train  a permutation that is a function of (seed, epoch); samples that do not fill a last step are dropped. Rank r
           takes the r-th slice of every `world * batch_size` samples; with `repeats` each image occurs that often,
           augmented anew, and the samples of a step are dealt out so that its copies are spread over most batches.
           For a source in shards the order also depends on the numbers of workers and ranks, see
           `recipes.data.stream_order`: there one rank reads an image, and its copies follow each other.
           False: in order, every sample exactly once over all ranks; the last batch may be short.
    micro_batches  of an optimiser step over all ranks, a multiple of `world`; None: one for each rank
    start  how many batches of this epoch were already consumed: the rest is the same as if they had been iterated.
    """
    if not train:
        return _eval_batches(source, batch_size, rank, world)[start:]
    found = stream_order_of(source, batch_size=batch_size, seed=seed, workers=workers, world=world, repeats=repeats)
    if found is not None:
        return Streamed(found, epoch, rank, start)
    micro_batches = micro_batches or world
    count = batches_per_epoch(source, batch_size, micro_batches) * micro_batches
    numbers = range(rank, count, world)[start:]
    return Planned(order(len(source), seed, epoch), epoch, numbers, batch_size, micro_batches, repeats)


def batches(source: Source, *, workers: int | None = None, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `batch_size` images for this rank: ((B, 3, H, W) float32, (B,) int64); `options` as `plan_batches`.

    In a process that uses a GPU images may be uint8, a quarter of the bytes: `source.finish` normalises them there.
    The random state of the calling process is not touched. Raises DataError naming the sample that failed.
    """
    return _iterate(source, plan_batches(source, workers=workers, **options), worker_count(source, workers))


def _iterate(source: Source, planned: Sequence[Batch], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    # an idle loader keeps its workers for the next epoch; one in use is not in the pool, so iterations never collide
    loader = source.idle.pop(workers, None) or _loader(source, workers)
    loader.batch_sampler.batches = planned
    whole = True
    try:
        for batch in _started(loader):
            if isinstance(batch, _Failure):
                raise batch.kind(batch.message)
            (images, labels), news = batch
            source.note(news)
            yield images if _on_gpu() else source.finish(images), labels
    # torch's, that of a process which cannot be started, or of the connection over which one hands over a batch
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, DataError):
            raise
        whole = False  # a worker that was killed takes the others with it
        raise DataError(_lost(source.name, error)) from error
    finally:  # also if the caller breaks off
        if whole:
            source.idle[workers] = loader
        del loader  # a traceback that is kept with an error would keep the workers alive


def _lost(name: str, error: Exception) -> str:
    """What to say of an error of torch's loader: something was raised, or a process is gone."""
    if str(error).startswith("Caught "):  # with its traceback
        return f"{name} could not be read: {error}"
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):  # of a fork
        more = "or raise the limit on processes (ulimit -u, or that of the container)"
        return f"a process to read {name} cannot be started: {error}. Lower data.workers or free memory, {more}"
    # how torch tells of a bus error, which is what a write to a full /dev/shm ends in
    full = any(words in str(error) for words in ("shared memory", "exited unexpectedly"))
    more = f"; if /dev/shm is full, {MORE_SHM}" if full else ""
    return f"a process reading {name} died: {str(error).rstrip('. ')}. Lower data.workers or free memory{more}"


def _started(loader: DataLoader) -> Iterator:
    """The loader's iterator, which only notices dead workers when it is asked for a batch.

    torch would raise from a signal handler, wherever the loop is, even in the middle of an update of the weights.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    # a worker that dies by a signal before it is set up leaves one that is not forked waiting for it to read its pipe
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        started = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return started


def _eval_batches(source: Source, batch_size: int, rank: int, world: int) -> list[Batch]:
    indices = range(rank, len(source), world)
    parts = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    return [Batch([(index, 0, 0) for index in part], list(part), list(part), opens=True) for part in parts]


class _Sampler:
    """The batch sampler: batches that are replaced before every epoch, so that workers live on between epochs."""

    def __init__(self):
        self.batches: Sequence[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Failure:
    """An exception of a worker as text, which passes between processes intact and without a traceback of both.

    kind  that of a DataError, such as BadImage if an image cannot be decoded; else DataError
    """

    def __init__(self, what: str, error: Exception):
        known, said = isinstance(error, DataError), str(error)
        if said.startswith(NO_SHM):
            said = f"{said}\n/dev/shm, through which workers hand over batches, is full: {MORE_SHM}"
        elif not known:
            said = traceback.format_exc()
        self.message = f"{what}: {said}"
        self.kind = type(error) if known else DataError


class _Samples(Dataset):
    """Samples of a batch, and which of them were replaced; or the first failure instead."""

    def __init__(self, source: Source, finish: bool):
        self.source, self.finish = source, finish

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, batch: Batch) -> tuple[list[tuple[Tensor, int]], list[Replaced]] | _Failure:
        source, records, samples = self.source, self.source.records, []
        ahead = records if isinstance(records, Shards) else None
        try:
            if ahead is not None:
                ahead.read(batch.reads, opens=batch.opens)
            with preserved():
                for key in batch.keys:
                    samples.append(source.draw(*key, finish=self.finish))
            if ahead is not None:
                ahead.forget(batch.done)
        except Exception as error:
            index, _, _ = batch.keys[min(len(samples), len(batch.keys) - 1)]
            return _Failure(f"sample {index} of {source.name} ({source.where(index)})", error)
        return samples, source.take_news()


def _collate(found: Any, *, source: Source) -> Any:
    if isinstance(found, _Failure):
        return found
    try:
        batch = source.collate(found[0])
        if get_worker_info() is not None:
            _share(batch)
        return batch, found[1]
    except Exception as error:
        return _Failure(source.name, error)


def _share(value: Any) -> None:
    """Move tensors to shared memory. The thread that hands over a batch would do it too, but if that fails, the batch
    is lost and its reader waits for ever.
    """
    if isinstance(value, Tensor):
        value.share_memory_()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _share(item)


def _start_worker(_: int) -> None:
    # the thread that hands over batches would print that nobody takes them any more
    sys.excepthook = _unless_left_alone
    # Ctrl-C and others reach every process of a terminal or a job: only the parent decides what to do
    for number in HELD - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    try:
        # torch's own watchdog looks up the parent when a worker starts: too late if it is dead by then
        threading.Thread(target=_end_with_parent, daemon=True).start()
    except RuntimeError as error:  # a limit on processes: there would be none for the thread that hands over batches
        note(f"a process that reads data ends: {error}; raise the limit on processes (ulimit -u)")
        os._exit(1)
    torch.set_num_threads(1)
    give_freed_memory_back()


def _unless_left_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _loader(source: Source, workers: int) -> DataLoader:
    # bytes are a quarter of the size of floats, from a worker and to a GPU, which normalises them in no time
    late = source.normalize is not None and (workers > 0 or _on_gpu())
    # a copy without the pool of loaders: in a reference cycle workers would only end at garbage collection, and slowly
    copied = copy.copy(source)
    return DataLoader(
        _Samples(copied, finish=not late),
        batch_sampler=_Sampler(),
        num_workers=workers,
        collate_fn=partial(_collate, source=copied),
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        multiprocessing_context=_context() if workers else None,
        pin_memory=_on_gpu(),
        # the loader draws a seed for its workers from this, not from the caller's random state
        generator=torch.Generator().manual_seed(seed_of(Stream.WORKERS, source.seed)),
    )


def _context() -> str | None:
    """Fork workers on Linux, whatever Python's default is, unless the program has chosen another method.

    Others import everything anew, which takes each of them seconds and hundreds of megabytes.
    """
    return "fork" if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None else None


def _on_gpu() -> bool:
    """Whether this process uses a GPU: if the run has one, the model is on it by now."""
    return torch.cuda.is_initialized()
