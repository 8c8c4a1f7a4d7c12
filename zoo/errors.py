"""Errors that a user of the zoo can act on, and a warning."""


class CheckpointError(RuntimeError):
    """A file of weights that cannot be read, or is not of the model it was meant for; the message says what to do."""


class LicenceWarning(UserWarning):
    """Weights were loaded whose licence forbids commercial use."""
