"""Where the time goes: from the command to the first step, and waiting for data within a step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Startup:
    """Seconds from the start of the process to the end of its first training step, by cause, in order."""

    def __init__(self) -> None:
        self.last = time.perf_counter() - _age()
        self.causes: dict[str, float] = {}

    def begin(self, cause: str) -> None:
        """`mark` in the first run of this process; a later run, of a sweep, counts from here."""
        if "first step" in self.causes:
            self.causes, self.last = {}, time.perf_counter()
        else:
            self.mark(cause)

    def mark(self, cause: str) -> None:
        """Attribute the time since the previous mark to `cause`; a repeated cause adds up."""
        now = time.perf_counter()
        self.causes[cause] = round(self.causes.get(cause, 0.0) + now - self.last, 3)
        self.last = now

    def split(self, cause: str, part: str, seconds: float) -> None:
        """Move `seconds` from `cause` to `part`."""
        self.causes |= {part: round(seconds, 3), cause: round(self.causes.pop(cause) - seconds, 3)}

    def text(self) -> str:
        parts = ", ".join(f"{cause} {seconds:.1f}" for cause, seconds in self.causes.items())
        return f"first step {sum(self.causes.values()):.1f} s after the command: {parts}"


def started(process: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None on systems that lack Linux's /proc."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _age() -> float:
    """Seconds since this process was started; 0 on systems that do not report it as Linux does."""
    if (ticks := started(os.getpid())) is None:
        return 0.0
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


STARTUP = Startup()


class Timed:
    """An iterator that records how long its caller waited for it."""

    def __init__(self, items: Iterator[Any]):
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began

    def taken(self) -> float:
        """Seconds waited since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
