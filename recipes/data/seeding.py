"""Randomness without state: every draw is seeded from its purpose, so that nothing has to be saved.

Data order and augmentation are functions of (seed, epoch, index), see recipes.data; drop path, dropout and Mixup of a
micro-batch are functions of (seed, number of the micro-batch), whichever process it runs on, see recipes.plan; what an
optimiser draws is a function of (seed, step), the same in all processes. A resumed run only needs to know its step.

The key of a stream of data begins with a `Stream`, that of `seed_all` with the seed and `INIT`, `MODEL` or `STEP`. The
same key gives different streams in `seed_all` and in `reseed`, as they derive their seeds differently.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

INIT, MODEL, STEP = 0, 1, 2  # the purpose of what is drawn after `seed_all`


class Stream(IntEnum):
    """The first integer of a key: streams of different purposes never overlap."""

    SAMPLE = 0
    ORDER = 1
    MIX = 2
    WORKERS = 3
    REPLACE = 4
    BUFFER = 5
    SCENES = 6


def seed_of(*key: int) -> int:
    """A 63-bit seed that depends on every integer of `key` (each at least 0) and on nothing else."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(*key: int) -> None:
    """Make python, numpy and torch (CPU) draw from the stream named by `key` from here on."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int.from_bytes(words.tobytes(), "little"))
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[:2].view(np.uint64)[0] >> np.uint64(1)))


def seed_all(*key: int) -> None:
    """Seed python's, numpy's and torch's global generators (all devices) from a tuple of non-negative integers."""
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(4)]
    torch.manual_seed(words[0] << 32 | words[1])
    random.seed(words[2])
    np.random.seed(words[3])


@contextmanager
def preserved() -> Iterator[None]:
    """Afterwards python, numpy and torch (CPU) draw as if nothing had been drawn inside."""
    python, numeric, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(torch_state)
