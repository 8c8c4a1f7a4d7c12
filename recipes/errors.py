"""The error of a run folder."""


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message says why and what to do."""
