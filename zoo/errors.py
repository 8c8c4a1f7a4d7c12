"""Errors that a user of the zoo can act on."""


class CheckpointError(RuntimeError):
    """A file of weights that cannot be read, or is not of the model it was meant for; the message says what to do."""
