"""What torch is told for the whole process, in a part of a test only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flags_restored() -> Iterator[None]:
    """What a run sets for its process, deterministic algorithms, must not reach other tests."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Algorithms whose order is fixed; torch refuses the others."""
    with flags_restored():
        torch.use_deterministic_algorithms(True)
        yield
