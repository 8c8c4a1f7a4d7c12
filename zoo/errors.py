"""Errors that a user of the zoo can act on, and a warning."""


def printable(text: str) -> str:
    """Text of a file for a terminal: what it would obey, an escape sequence say, is spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class CheckpointError(RuntimeError):
    """A file of weights that cannot be read, or is not of the model it was meant for; the message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may quote the file


class LicenceWarning(UserWarning):
    """Weights were loaded whose licence forbids commercial use."""
