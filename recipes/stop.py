"""Ctrl-C, SIGTERM and SIGUSR1, made polite: the loop asks between steps and evaluated batches whether to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from recipes import distributed
from recipes.log import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 85  # the exit status of a run that a scheduler stopped: saved, to be started again with resume=

T = TypeVar("T")


class Stopped(Exception):
    """What went on was left undone, as a signal asked for."""


class Stop:
    """Remembers the first signal; `signal` is what all processes have agreed on, with whichever it arrived.

    Ctrl-C once more ends the process at once, as it would without this. What a scheduler sends may come more than once:
    Slurm sends SIGTERM to every process of a step, and torchrun, one of them, hands it on to those that have it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.noted: int | None = None
        self._process = os.getpid()

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> None:
        """Between steps, on all processes."""
        self.signal = distributed.highest(self.noted or 0) or None

    def until(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an evaluation, which all processes leave with Stopped after the one in which a signal came."""
        for batch in batches:
            yield batch
            self.agree()
            if self.signal:
                raise Stopped

    @property
    def code(self) -> int:
        """The exit status of a run that was stopped: what a shell reports after Ctrl-C, else REQUEUE."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else REQUEUE

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked data worker: Ctrl-C reaches it too, and the loop that it serves decides
        if self.noted is None:
            self.noted = number
            once_more = "; once more stops at once, without saving" if number == signal.SIGINT else ""
            say(f"stopping after this step, to save{once_more}", "yellow")
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
