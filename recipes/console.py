"""What commands print: lines on standard output, above a progress bar where there is one, and notes on stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import track

from ops.tool import replace_what_cannot_be_encoded

T = TypeVar("T")


class Output(Console):
    """Standard output; while it is `optional`, the first error of writing switches it off, with a note on stderr.

    Runs and evaluations set that, to outlive their reader: Ctrl-C ends `tee` first, and a terminal may be closed.
    """

    optional = False

    def __exit__(self, *raised: Any) -> None:  # every write of rich's ends here
        try:
            super().__exit__(*raised)
        except OSError as error:
            if not self.optional:
                raise
            self._switch_off(str(error))

    def on_broken_pipe(self) -> None:
        if not self.optional:
            super().on_broken_pipe()
        self._switch_off(os.strerror(errno.EPIPE))

    def _switch_off(self, why: str) -> None:
        self.quiet = True
        errors = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # a progress bar would print it to this console
        note(f"nothing more is printed, because standard output cannot be written: {why}", errors)
        _discard(self.file)


CONSOLE = Output(highlight=False, soft_wrap=True, markup=False, emoji=False)  # names may have brackets and colons


replace_what_cannot_be_encoded()


def note(text: str, file: TextIO | None = None) -> None:
    """Print a line to stderr, or the given file; if it cannot be written, what is printed there later is discarded."""
    file = file or sys.stderr
    try:
        print(f"{text}\n", end="", file=file, flush=True)  # in one write, as other ranks may print at the same time
    except OSError:
        _discard(file)


def _discard(file: TextIO) -> None:
    """Send a file that cannot be written, and what its buffer holds, to nowhere: an exit would fail to flush it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


def say(text: str, style: str | None = None) -> None:
    """Print a line, above the progress bar where there is one."""
    CONSOLE.print(text, style=style)


def tracked(items: Iterable[T], total: int, text: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal; elsewhere an older rich prints an empty line, even if disabled."""
    return track(items, text, total, console=CONSOLE, transient=True) if CONSOLE.is_terminal else items
