"""Ctrl-C and SIGTERM, made polite: the loop asks between steps whether it should stop."""

from __future__ import annotations

import os
import signal
from types import FrameType

from recipes.log import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Remembers the first signal in `signal`; a second one ends the process at once, as it would without this."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._process = os.getpid()

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked data worker: Ctrl-C reaches it too, and the loop that it serves decides
        self.signal = number
        say("stopping after this step, to save; once more stops at once, without saving", "yellow")
        for each, handler in self._before.items():
            signal.signal(each, handler)
