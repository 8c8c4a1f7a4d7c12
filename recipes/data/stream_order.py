"""The order of a streamed epoch: which sample each reader of each rank reads and returns at each step.

1. Shards are sorted by name; a sample is (shard, offset), or its index: offset + the samples of all shards before.
2. (seed, epoch) draws a permutation of the shards. Their samples, shard after shard, each from its first to its last,
   and all of it rotated by a drawn number of samples, are the sequence of the epoch.
3. The sequence is split into one part per reader: those of rank 0 first, within a rank in the order of readers. A rank
   has as many readers as worker processes, at least one. A part is as long as the batches that the reader returns:
   batch b of a rank comes from reader b modulo their number. Samples that no batch needs are at the end of the
   sequence, and differ from epoch to epoch.
4. A reader reads its part in order into a buffer of `buffer` samples. While there are samples left, the buffer is full;
   (seed, epoch, rank, reader) draws the slot whose sample is returned and which is refilled by the sample read next.
   With `repeats` a sample is returned that many times in a row.

So order and position are functions of (seed, epoch, step) and of the values in `StreamOrder`: nothing is stored. At any
step the samples in a buffer are known by arithmetic; a reader that resumes there reads them again, and no others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch

from recipes.data.seeding import Stream, seed_of


@dataclass(frozen=True)
class StreamOrder:
    """What the order depends on.

    counts   samples of each shard
    buffer   samples in the shuffle buffer of a reader
    world    number of ranks
    readers  readers per rank
    batch    images in a batch of one rank
    repeats  how often a sample is returned in a row
    """

    counts: tuple[int, ...]
    buffer: int
    seed: int
    world: int
    readers: int
    batch: int
    repeats: int = 1

    @property
    def batches(self) -> int:
        """Batches of a rank in an epoch."""
        return sum(self.counts) // (self.batch * self.world)

    def sequence(self, epoch: int) -> np.ndarray:
        """(N,) indices in the order of the sequence that the readers share."""
        generator = torch.Generator().manual_seed(seed_of(Stream.ORDER, self.seed, epoch))
        starts = np.cumsum([0, *self.counts])
        shards = torch.randperm(len(self.counts), generator=generator).tolist()
        indices = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        return np.roll(indices, -int(torch.randint(len(indices), (), generator=generator)))

    def needs(self, reader: int) -> int:
        """Samples that a reader of any rank reads in an epoch."""
        return -(-len(range(reader, self.batches, self.readers)) * self.batch // self.repeats)

    def part(self, epoch: int, rank: int, reader: int) -> np.ndarray:
        """The indices that a reader reads, in the order of reading."""
        needs = [self.needs(number) for number in range(self.readers)]
        first = rank * sum(needs) + sum(needs[:reader])
        return _sequence(self, epoch)[first : first + needs[reader]]

    def buffer_seed(self, epoch: int, rank: int, reader: int) -> int:
        """The seed of a reader's draws."""
        return seed_of(Stream.BUFFER, self.seed, epoch, rank, reader)

    def given(self, epoch: int, rank: int, reader: int) -> np.ndarray:
        """Positions in the reader's part, in the order in which they are returned, each once."""
        size = self.needs(reader)
        draws = np.random.PCG64(self.buffer_seed(epoch, rank, reader)).random_raw(size)
        filled = np.minimum(self.buffer, size - np.arange(size)).astype(np.uint64)
        held, given = list(range(min(self.buffer, size))), np.empty(size, np.int64)
        for step, place in enumerate((draws % filled).tolist()):
            given[step] = held[place]
            if step + self.buffer < size:
                held[place] = step + self.buffer
            else:
                held[place] = held[-1]
                held.pop()
        return given


@lru_cache(maxsize=2)
def _sequence(order: StreamOrder, epoch: int) -> np.ndarray:
    return order.sequence(epoch)


@lru_cache(maxsize=2)
def _given_in(order: StreamOrder, epoch: int) -> dict[tuple[int, int], np.ndarray]:
    """What `_given` has computed; cached per epoch: its size is the number of samples, whatever that of readers."""
    return {}


def _given(order: StreamOrder, epoch: int, rank: int, reader: int) -> np.ndarray:
    found = _given_in(order, epoch)
    if (rank, reader) not in found:
        found[rank, reader] = order.given(epoch, rank, reader)
    return found[rank, reader]


@dataclass(frozen=True)
class Batch:
    """What a worker does for one batch; everything but the keys only concerns shards.

    keys    (index, epoch, copy) of its samples
    reads   indices that are read before, in the order of reading
    done    indices that no later batch needs
    opens   whether the reader starts here, with an empty buffer
    """

    keys: list[tuple[int, int, int]]
    reads: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    opens: bool = False


@dataclass(frozen=True)
class Streamed(Sequence[Batch]):
    """A rank's batches of an epoch from `start` on, each made when it is reached; batch b is for worker b modulo
    order.readers. A part of them is a list.
    """

    order: StreamOrder
    epoch: int
    rank: int
    start: int = 0

    def __len__(self) -> int:
        return max(self.order.batches - self.start, 0)

    def __iter__(self) -> Iterator[Batch]:
        given = self.order, self.epoch, self.rank
        of_reader = [_of_reader(*given, reader, self.start) for reader in range(self.order.readers)]
        for number in range(self.start, self.order.batches):
            yield next(of_reader[number % self.order.readers])

    def __getitem__(self, place: int | slice) -> Batch | list[Batch]:
        chosen = range(len(self))[place]
        if isinstance(chosen, int):
            return next(islice(self, chosen, None))
        return list(islice(self, chosen.start, chosen.stop, chosen.step))


def _of_reader(order: StreamOrder, epoch: int, rank: int, reader: int, start: int) -> Iterator[Batch]:
    part, given = order.part(epoch, rank, reader), _given(order, epoch, rank, reader)
    before = len(range(reader, start, order.readers)) * order.batch  # samples returned, counting repeats
    ends = range(before + order.batch, len(range(reader, order.batches, order.readers)) * order.batch + 1, order.batch)
    reached, over, furthest = 0, given[: before // order.repeats], np.maximum.accumulate(given)
    for end in ends:
        turns = [divmod(turn, order.repeats) for turn in range(end - order.batch, end)]
        upto = int(furthest[turns[-1][0]]) + 1
        reads = np.arange(reached, upto)
        if end == ends[0]:
            reads = np.setdiff1d(reads, over)
        yield Batch(
            keys=[(int(part[given[turn]]), epoch, copy) for turn, copy in turns],
            reads=part[reads].tolist(),
            done=part[given[(end - order.batch) // order.repeats : end // order.repeats]].tolist(),
            opens=end == ends[0],
        )
        reached = upto


def readers_at(order: StreamOrder, names: list[str], epoch: int, start: int) -> list[dict[str, Any]]:
    """The position of every reader of every rank after `start` batches of an epoch; `names` are those of the shards.

    next    [shard, offset] of the sample that it reads next; None after the last
    oldest  [shard, offset] of its first sample that is not returned yet, where a resumed reader starts
    held    samples in its buffer
    seed    of its draws
    """
    return [
        {"rank": rank, "reader": reader, **_reader_at(order, names, epoch, rank, reader, start)}
        for rank in range(order.world)
        for reader in range(order.readers)
    ]


def _reader_at(order: StreamOrder, names: list[str], epoch: int, rank: int, reader: int, start: int) -> dict[str, Any]:
    part, given = order.part(epoch, rank, reader), _given(order, epoch, rank, reader)
    done = len(range(reader, start, order.readers)) * order.batch // order.repeats
    read = int(given[:done].max(initial=-1)) + 1
    oldest = int(given[done:].min(initial=len(part)))
    ends = np.cumsum(order.counts)

    def place(turn: int) -> list[str | int] | None:
        if turn == len(part):
            return None
        shard = int(np.searchsorted(ends, part[turn], side="right"))
        return [names[shard], int(part[turn] - ends[shard] + order.counts[shard])]

    seed = order.buffer_seed(epoch, rank, reader)
    return {"next": place(read), "oldest": place(oldest), "held": read - done, "seed": seed}
