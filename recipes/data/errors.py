"""The errors of this package."""


class DataError(RuntimeError):
    """The data cannot be used as asked; the message says what was given, what was expected and what to do."""


class BadImage(DataError):
    """An image is there but cannot be decoded: what `data.on_bad_image=replace` passes over.

    advice  what to do where it is not passed over
    """

    def __init__(self, message: str, advice: str = "Replace or remove it, or give data.on_bad_image=replace"):
        super().__init__(message)
        self.advice = advice
