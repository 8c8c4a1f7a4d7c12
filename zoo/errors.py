"""Errors that a user of the zoo can act on, and a warning."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def printable(text: str) -> str:
    """Text from a file, safe to print: what a terminal would act on, such as an escape sequence, is spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """The first line of a library's error message; the type of one without a message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first few of `names` for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class CheckpointError(RuntimeError):
    """A weights file cannot be read, or does not fit the model it was meant for; the message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may quote the file


class LicenceWarning(UserWarning):
    """Weights were loaded whose licence forbids commercial use."""


@contextmanager
def plain_warnings() -> Iterator[None]:
    """For commands: a LicenceWarning is printed as one line, without the place in the code that it comes from."""
    given = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        return f"{message}\n" if issubclass(category, LicenceWarning) else given(message, category, *where, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = given
