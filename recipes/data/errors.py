"""The one error of this package."""


class DataError(RuntimeError):
    """The data cannot be used as asked; the message says what was given, what was expected and what to do."""
