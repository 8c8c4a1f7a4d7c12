"""Randomness without state: every draw is seeded from its purpose, so that nothing has to be saved.

Drop path, dropout and Mixup of a part of a batch are functions of (seed, number of the part), whichever process it runs
on, see recipes.plan; data order and augmentation are functions of (seed, epoch, index), see recipes.data. A resumed run
only needs to know its step.
"""

from __future__ import annotations

import random

import numpy as np
import torch

INIT, MODEL = 0, 1  # the purpose of a draw: streams of different purposes never overlap


def seed_all(*key: int) -> None:
    """Seed python's, numpy's and torch's global generators (all devices) from a tuple of non-negative integers."""
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(4)]
    torch.manual_seed(words[0] << 32 | words[1])
    random.seed(words[2])
    np.random.seed(words[3])
