"""How commands end: quietly where nobody waits for the rest, with one line where their output cannot be written."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given, Result = ParamSpec("Given"), TypeVar("Result")


def tool(main: Callable[Given, Result]) -> Callable[Given, Result]:
    """For the `main` of a command: no traceback where it is interrupted or cannot print.

    Ctrl-C ends it with the status 130, and a reader that has left, such as head, with 141: both are a shell's. Where
    standard output cannot be written for another reason, such as a full disk, the status is 1, and the reason is said.
    """

    @functools.wraps(main)
    def wrapper(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            result = main(*args, **kwargs)
        except KeyboardInterrupt:
            _unwritable()
            sys.exit(128 + signal.SIGINT)
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
        sys.exit(f"error: standard output cannot be written: {broken.strerror}")

    return wrapper


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
