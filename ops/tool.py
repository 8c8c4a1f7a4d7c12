"""What commands share: how they and their processes start and end, how they write files, and their options."""

import argparse
import functools
import io
import math
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import ParamSpec, TypeVar

Given, Result = ParamSpec("Given"), TypeVar("Result")


class ToolError(SystemExit):
    """What a command cannot do, with a message that says what to do; its exit status is 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2


class WriteError(OSError):
    """A file that a command writes cannot be written; the message names it."""


def tool(main: Callable[Given, Result]) -> Callable[Given, Result]:
    """For the `main` of a command: no traceback where it is interrupted or cannot print or write.

    Ctrl-C ends it with the status 130, and a reader that has left, such as head, with 141: both are a shell's. Where
    standard output cannot be written for another reason, such as a full disk, and for ToolError and WriteError it is 2,
    after a line on stderr.
    """

    @functools.wraps(main)
    def wrapper(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        replace_what_cannot_be_encoded()
        try:
            result = main(*args, **kwargs)
        except KeyboardInterrupt:
            _unwritable()
            sys.exit(128 + signal.SIGINT)
        except (ToolError, WriteError) as error:
            _unwritable()
            raise _told(str(error)) from error
        except SystemExit:
            _unwritable()
            raise
        except OSError as error:
            broken = _unwritable("\n")  # what could not be written may be gone from the buffer
            if broken is None or broken.errno != error.errno:
                raise
        else:
            broken = _unwritable()
            if broken is None:
                return result
        if isinstance(broken, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise _told(f"standard output cannot be written: {broken.strerror}")

    return wrapper


def command(module: str) -> str:
    """How this run of `module` was started, as it can be pasted into a shell: a peer's name may have a space."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def replace_what_cannot_be_encoded() -> None:
    """Let stdout and stderr print ? for what their encoding lacks, as Latin-1 lacks the ellipsis of rich's tables."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _told(message: str) -> ToolError:
    print(f"error: {message}", file=sys.stderr)
    return ToolError(message)


def end_with(parent: int) -> None:
    """For a process that a command started: end where the command was killed, instead of waiting for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _unwritable(text: str = "") -> OSError | None:
    """Why standard output cannot be written, if so; what it holds is then discarded, or an exit would fail at it."""
    try:
        print(end=text, flush=True)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return error
    return None


def check_file(path: Path) -> None:
    """Raise OSError if there is something else than a file: renaming a file to it would do away with a device."""
    if path.exists() and not path.is_file():
        kind = IsADirectoryError if path.is_dir() else OSError
        raise kind(f"{path} is a folder, a pipe or a device: give the name of a file")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which is renamed to `path` on success and removed on failure.

    Raises OSError, before anything is written, if `path` is something else than a file, such as /dev/stdout.
    """
    check_file(path)
    # cut, since file names have a maximum length; a process on another machine may have the same number
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def overwrite(path: Path, text: str) -> None:
    """Writes a file atomically: a run may be interrupted while it writes. Raises WriteError."""
    try:
        with replaced(path) as temporary:
            temporary.write_text(text, "utf-8")
    except OSError as error:
        raise WriteError(f"could not write {path}: {error}") from error


def writable(folder: Path, file: Path | None = None) -> None:
    """Make a folder, and that of a file. Raises ToolError if nothing can be written there: before the work."""
    try:
        for place in (folder, *([] if file is None else [file.parent])):
            place.mkdir(parents=True, exist_ok=True)
            with replaced(place / ".writable") as temporary:
                temporary.touch()
            (place / ".writable").unlink(missing_ok=True)  # two commands may try at once
        if file is not None:
            check_file(file)
    except OSError as error:
        raise ToolError(f"cannot write to {place}: {error}") from error


def amount(text: str) -> float:
    """An option's amount, above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return number


def count(text: str) -> int:
    """An option's number, from 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 0")
    return number


def positive(text: str) -> int:
    """An option's number, from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number
