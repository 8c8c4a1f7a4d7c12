"""Graceful stops by Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP: the loop looks for them between steps and batches."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TypeVar

from recipes import config, distributed
from recipes.console import note, say

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler's, before it ends the job
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS, signal.SIGHUP)
# signals that end the process at once if sent again, and how many seconds after the first: until then the same one may
# arrive by several ways
AGAIN = {signal.SIGINT: 5.0, signal.SIGTERM: 30.0}
ONCE_MORE = {
    signal.SIGINT: "; press Ctrl-C again{} to stop at once, without saving",
    signal.SIGTERM: f"; another SIGTERM, after {AGAIN[signal.SIGTERM]:.0f} seconds, stops at once, without saving",
}
REQUEUE = 85  # the exit status of a run stopped by a scheduler: saved, and to be resumed with resume=

T = TypeVar("T")


class Stopped(Exception):
    """An evaluation was cut off by a signal."""


_SAVING = threading.Event()


@contextmanager
def saving() -> Iterator[None]:
    """While a checkpoint is written: a repeated SIGTERM, which may come unasked, waits for it, however long that is."""
    _SAVING.set()
    try:
        yield
    finally:
        _SAVING.clear()


@contextmanager
def requeued() -> Iterator[None]:
    """A scheduler's warning before there is anything to save ends the process with REQUEUE, unless it has a handler.

    In a sweep this holds between its runs too, and after them.
    """
    taken = [number for number in WARNINGS if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end_unsaved)
    try:
        yield
    finally:
        for number in taken if config.job_number() is None else ():
            signal.signal(number, signal.SIG_DFL)


def _end_unsaved(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(RuntimeError):  # as in `Stop._note`
        say(f"{signal.Signals(number).name}: this process ends, with nothing to save", "yellow")
    sys.exit(REQUEUE)


class Stop:
    """Remembers the first signal; `signal` is what all processes have agreed on, whichever of them received it.

    SIGINT again         ends the process at once, as it would without this; where Python's handlers are not called, as
                         the loop waits for another process, only after AGAIN
    SIGTERM again        ends it at once after AGAIN, unless it is `saving`; earlier ones are duplicates: Slurm signals
                         every process of a step, and torchrun, one of them, passes the signal on to the others
    SIGTERM after SIGINT counts as a second SIGINT: torchrun passes that on as SIGTERM
    SIGHUP               stays ignored where it was, as under nohup
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.noted: int | None = None
        self._process = os.getpid()

    def __enter__(self) -> Stop:
        taken = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._read, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            os.close(self._read)
            os.close(self._written)
            raise config.ConfigError(
                f"{error}, which every run needs: raise the limit on processes (ulimit -u, or that of the container), "
                "or end some of this user's"
            ) from error
        self._before = {number: signal.signal(number, self._note) for number in taken}
        # the interpreter writes the number of each signal there as it arrives, whatever the main thread waits for
        self._other = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._other)
        os.write(self._written, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._written)

    def agree(self) -> None:
        """Between steps, on all processes."""
        self.signal = distributed.highest(self.noted or 0) or None

    def until(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an evaluation; after a signal, all processes leave it with Stopped at the end of the batch."""
        for batch in batches:
            yield batch
            self.agree()
            if self.signal:
                raise Stopped

    def end(self) -> NoReturn:
        """Exit after the save, with what a shell reports after Ctrl-C, else with REQUEUE. All processes must call this.

        If a warning had a handler of others before, such as submitit's, which queues the job again, the first process
        calls it, and its exit status is that of all.
        """
        own = 128 + signal.SIGINT if self.signal == signal.SIGINT else REQUEUE
        sys.exit(distributed.first(lambda: self._hand_on(own)))

    def _hand_on(self, own: int) -> int | str | None:
        handler = self._before.get(self.signal)
        if self.signal in WARNINGS and callable(handler) and handler is not _end_unsaved:
            try:
                handler(self.signal, None)
            except SystemExit as end:
                return end.code
        return own

    def _watch(self) -> None:
        """End the process if a signal is sent again."""
        came: dict[int, float] = {}
        while number := os.read(self._read, 1)[0]:  # 0 from `__exit__`
            now = time.monotonic()
            came.setdefault(number, now)
            like = signal.SIGINT if number == signal.SIGTERM and next(iter(came)) == signal.SIGINT else number
            again = like in AGAIN and now - came[like] > AGAIN[like]
            if again and not (number == signal.SIGTERM and _SAVING.is_set()):
                how = "again" if like == number else "after SIGINT"
                note(f"{signal.Signals(number).name} {how}: this process ends at once, without saving")
                os._exit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked data worker: Ctrl-C reaches it too, but the main process decides
        if self.noted is None:
            self.noted = number
            late = f" after {AGAIN[signal.SIGINT]:.0f} seconds" if distributed.job() else ""
            with suppress(RuntimeError):  # the signal came in the middle of another line, and a file is not reentrant
                say(f"stopping after this step and saving{ONCE_MORE.get(number, '').format(late)}", "yellow")
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
