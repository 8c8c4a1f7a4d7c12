"""Batches of a source: seeded order, exact resumption, worker processes.

A source that is read by index has a permutation for each epoch, and any number of workers and ranks gives the same
batches. A source in shards is read sequentially, in the order that `recipes.data.law` describes.
"""

import copy
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.data import law
from recipes.data.errors import DataError
from recipes.data.law import Batch, Law
from recipes.data.seeding import Stream, preserved, seed_of
from recipes.data.shards import Shards
from recipes.data.source import Replaced, Source
from zoo.allocator import give_freed_memory_back

TINY = 5_000  # number of images below which worker processes are not worth their cost


def worker_count(source: Source, workers: int | None = None) -> int:
    """`workers` if given; else the cores of this rank minus one, at most 4, and none for a tiny set."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if len(source) < TINY else max(0, min(4, cores - 1))


def batches_per_epoch(source: Source, batch_size: int, world: int = 1, repeats: int = 1) -> int:
    """Full training batches of one rank in an epoch; `repeats` does not lengthen it.

    Raises DataError if the source does not fill one batch on every rank.
    """
    count = len(source) // (batch_size * world)
    if count == 0:
        raise DataError(
            f"{source.name} has {len(source)} images, fewer than one batch of {batch_size * world}: "
            f"set data.batch_size= to at most {len(source)}"
        )
    return count


def order(source: Source, *, seed: int, epoch: int, repeats: int = 1) -> list[tuple[int, int]]:
    """The (index, copy) pairs of an epoch: a permutation, each index `repeats` times in a row, cut to length."""
    generator = torch.Generator().manual_seed(seed_of(Stream.ORDER, seed, epoch))
    indices = torch.randperm(len(source), generator=generator)[: -(-len(source) // repeats)].tolist()
    return [(index, copy) for index in indices for copy in range(repeats)][: len(source)]


def law_of(
    source: Source, *, batch_size: int, seed: int, workers: int | None, world: int = 1, repeats: int = 1
) -> Law | None:
    """The law for the order of a source in shards; None for one that is read by index."""
    if not isinstance(source.records, Shards):
        return None
    records, readers = source.records, max(1, worker_count(source, workers))
    batches_per_epoch(source, batch_size, world, repeats)
    counts = tuple(records.counts.tolist())
    return Law(counts, records.buffer, seed, world, readers, batch_size, repeats)


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
    parts: int | None = None,
) -> list[Batch]:
    """What `batches` yields, as indices; nothing is read."""
    if not train:
        return _eval_batches(source, batch_size, rank, world)[start:]
    found = law_of(source, batch_size=batch_size, seed=seed, workers=workers, world=world, repeats=repeats)
    if found is not None:
        return law.batches(found, epoch, rank, start)
    parts = parts or world
    count = batches_per_epoch(source, batch_size, parts, repeats) * parts
    keys = [(index, epoch, copy) for index, copy in order(source, seed=seed, epoch=epoch, repeats=repeats)]
    numbers = range(rank, count, world)[start:]
    return [Batch(_part(keys, number, batch_size, parts, repeats)) for number in numbers]


def _part(keys: list[Any], number: int, size: int, parts: int, repeats: int) -> list[Any]:
    """The samples of a part; parts are numbered over the epoch, and `parts` of them share the samples of a step.

    Each takes a slice; of repeated images each takes every `parts`-th, so that copies do not end up in one part.
    """
    step, part = divmod(number, parts)
    shared = keys[step * parts * size : (step + 1) * parts * size]
    return shared[part * size : (part + 1) * size] if repeats == 1 else shared[part::parts]


def batches(
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
    parts: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `batch_size` images for this rank: ((B, 3, H, W) float32, (B,) int64).

    In a process that uses a GPU images may be uint8, a quarter of the bytes: `source.finish` normalises them there.

    train  a permutation that is a function of (seed, epoch); samples that do not fill a last step are dropped. Rank r
           takes the r-th slice of every `world * batch_size` samples; with `repeats` each image occurs that often,
           augmented anew, and the samples of a step are dealt out so that its copies are spread over most batches.
           For a source in shards the order also depends on the numbers of workers and ranks, see `recipes.data.law`:
           there one rank reads an image, and its copies follow each other.
    parts  batches of an optimiser step over all ranks, a multiple of `world`; None: one for each rank
    eval   in order, every sample exactly once over all ranks; the last batch may be short.
    start  how many batches of this epoch were already consumed: the rest is the same as if they had been iterated.
    The random state of the calling process is not touched. Raises DataError naming the sample that failed.
    """
    planned = plan_batches(
        source,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        train=train,
        start=start,
        workers=workers,
        rank=rank,
        world=world,
        repeats=repeats,
        parts=parts,
    )
    return _iterate(source, planned, worker_count(source, workers))


def _iterate(source: Source, planned: list[Batch], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    # an idle loader keeps its workers for the next epoch; one in use is not in the pool, so iterations never collide
    loader = source.idle.pop(workers, None) or _loader(source, workers)
    loader.batch_sampler.batches = planned
    whole = True
    try:
        for batch in _started(loader):
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            (images, labels), news = batch
            source.note(news)
            yield images if _on_gpu() else source.finish(images), labels
    except RuntimeError as error:
        if isinstance(error, DataError):
            raise
        whole = False  # a worker that was killed takes the others with it
        raise DataError(f"a process reading {source.name} died: {error}. Lower data.workers or free memory") from error
    finally:  # also if the caller breaks off
        if whole:
            source.idle[workers] = loader
        del loader  # a traceback that is kept with an error would keep the workers alive


def _started(loader: DataLoader) -> Iterator:
    """The loader's iterator, which only notices dead workers when it is asked for a batch.

    torch would raise from a signal handler, wherever the loop is, even in the middle of an update of the weights.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    started = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return started


def _eval_batches(source: Source, batch_size: int, rank: int, world: int) -> list[Batch]:
    indices = range(rank, len(source), world)
    parts = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    return [Batch([(index, 0, 0) for index in part], list(part), list(part), opens=True) for part in parts]


class _Planned:
    """The batch sampler: a list that is replaced before every epoch, so that workers live on between epochs."""

    def __init__(self):
        self.batches: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Failure:
    """An exception of a worker as text, which passes between processes intact and without a traceback of both."""

    def __init__(self, what: str, error: Exception):
        self.message = f"{what}: {error if isinstance(error, DataError) else traceback.format_exc()}"


class _Samples(Dataset):
    """Samples of a batch, and which of them were replaced; or the first failure instead."""

    def __init__(self, source: Source, finish: bool):
        self.source, self.finish = source, finish

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, batch: Batch) -> "tuple[list[tuple[Tensor, int]], list[Replaced]] | _Failure":
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


def _collate(found: Any, *, collate: Callable[[list[Any]], Any]) -> Any:
    return found if isinstance(found, _Failure) else (collate(found[0]), found[1])


def _start_worker(_: int) -> None:
    # torch's own watchdog looks up the parent when a worker starts: too late if it is dead by then
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches every process of a terminal: only the parent decides what to do
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    give_freed_memory_back()


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
        batch_sampler=_Planned(),
        num_workers=workers,
        collate_fn=partial(_collate, collate=copied.collate),
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        pin_memory=_on_gpu(),
        # the loader draws a seed for its workers from this, not from the caller's random state
        generator=torch.Generator().manual_seed(seed_of(Stream.WORKERS, source.seed)),
    )


def _on_gpu() -> bool:
    """Whether this process uses a GPU: if the run has one, the model is on it by now."""
    return torch.cuda.is_initialized()
