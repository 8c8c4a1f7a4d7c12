"""Batches of a source: seeded order, exact continuation, worker processes."""

import copy
import os
import signal
import threading
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from recipes.data.errors import DataError
from recipes.data.seeding import Stream, preserved, seed_of
from recipes.data.source import Source

TINY = 5_000  # images that never cost enough to pay for worker processes
Key = tuple[int, int, int]  # index, epoch, copy


def worker_count(source: Source, workers: int | None = None) -> int:
    """`workers` if given; else one process less than there are cores for this rank, at most 4, none for a tiny set."""
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
            f"give data.batch_size= at most {len(source)}"
        )
    return count


def order(source: Source, *, seed: int, epoch: int, repeats: int = 1) -> list[tuple[int, int]]:
    """The (index, copy) pairs of an epoch: a permutation, each index `repeats` times in a row, cut to length."""
    generator = torch.Generator().manual_seed(seed_of(Stream.ORDER, seed, epoch))
    indices = torch.randperm(len(source), generator=generator)[: -(-len(source) // repeats)].tolist()
    return [(index, copy) for index in indices for copy in range(repeats)][: len(source)]


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `batch_size` images for this rank: ((B, 3, H, W) float32, (B,) int64).

    train  a permutation that is a function of (seed, epoch); the last, short batch is dropped. Rank r takes the r-th
           slice of every `world * batch_size` samples; with `repeats` each image comes that often, augmented anew.
    eval   in order, every sample exactly once over all ranks; the last batch may be short.
    start  how many batches of this epoch were already consumed: what follows is the same as if they were iterated.
    The random state of the calling process is not touched. Raises DataError naming the sample that failed.
    """
    if train:
        keys = _train_keys(source, batch_size, seed, epoch, rank, world, repeats)
    else:
        keys = _eval_keys(source, batch_size, rank, world)
    return _iterate(source, keys[start:], worker_count(source, workers))


def _iterate(source: Source, keys: list[list[Key]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    # an idle loader keeps its workers for the next epoch; one in use is not in the pool, so iterations never meet
    loader = source.idle.pop(workers, None) or _loader(source, workers)
    loader.batch_sampler.keys = keys
    whole = True
    try:
        for batch in _started(loader):
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch
    except RuntimeError as error:
        if isinstance(error, DataError):
            raise
        whole = False  # a worker that was killed takes the others along
        raise DataError(f"a process reading {source.name} died: {error}. Lower data.workers or free memory") from error
    finally:  # also where the caller breaks off
        if whole:
            source.idle[workers] = loader
        del loader  # a stack that is kept with an error would keep the workers


def _started(loader: DataLoader) -> Iterator:
    """The loader's iterator, whose dead workers are found where it is asked for a batch.

    torch would raise from a signal handler, wherever the loop is: in the middle of an update of the weights, too.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    started = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return started


def _train_keys(source, batch_size, seed, epoch, rank, world, repeats) -> list[list[Key]]:
    count = batches_per_epoch(source, batch_size, world, repeats)
    keys = [(index, epoch, copy) for index, copy in order(source, seed=seed, epoch=epoch, repeats=repeats)]
    firsts = [(step * world + rank) * batch_size for step in range(count)]
    return [keys[first : first + batch_size] for first in firsts]


def _eval_keys(source, batch_size, rank, world) -> list[list[Key]]:
    keys = [(index, 0, 0) for index in range(rank, len(source), world)]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]


class _Keys:
    """The batch sampler: a list that is exchanged before every epoch, so that workers live on between epochs."""

    def __init__(self):
        self.keys: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Failure:
    """An exception of a worker as text: it crosses the process border whole, and without a stack of two processes."""

    def __init__(self, source: Source, index: int, error: Exception):
        detail = str(error) if isinstance(error, DataError) else traceback.format_exc()
        self.message = f"sample {index} of {source.name} ({source.where(index)}): {detail}"


class _Samples(Dataset):
    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[Key]) -> list:
        with preserved():
            return [self._sample(*key) for key in keys]

    def _sample(self, index: int, epoch: int, copy: int) -> "tuple[Tensor, int] | _Failure":
        try:
            return self.source.draw(index, epoch, copy)
        except Exception as error:
            return _Failure(self.source, index, error)


def _collate(samples: list) -> "list[Tensor] | _Failure":
    failures = [sample for sample in samples if isinstance(sample, _Failure)]
    return failures[0] if failures else default_collate(samples)


def _start_worker(_: int) -> None:
    # Ctrl-C reaches every process of a terminal: the parent alone decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _loader(source: Source, workers: int) -> DataLoader:
    return DataLoader(
        # a copy without the pool of loaders: in a cycle workers would end when the garbage is collected, and slowly
        _Samples(copy.copy(source)),
        batch_sampler=_Keys(),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # the loader draws a seed for its workers: from here, not from the caller's random state
        generator=torch.Generator().manual_seed(seed_of(Stream.WORKERS, source.seed)),
    )
