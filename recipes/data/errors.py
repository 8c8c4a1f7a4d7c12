"""The errors of this package."""

from zoo.errors import printable


class DataError(RuntimeError):
    """The data cannot be used as requested; the message says what was given, what was expected and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))  # it may name files


class BadImage(DataError):
    """An image exists but cannot be decoded, so that `data.on_bad_image=replace` replaces it.

    advice  what to do if it is not replaced
    """

    def __init__(self, message: str, advice: str = "Replace or remove it, or set data.on_bad_image=replace"):
        super().__init__(message)
        self.advice = advice


class Misread(BadImage):
    """A BadImage that another configuration would read, as `advice` says; a resumed run keeps its own."""


class NoBatch(DataError):
    """Images cannot form a batch as the configuration prepares them, which a resumed run keeps."""
