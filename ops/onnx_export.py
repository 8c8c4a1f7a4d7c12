"""Whether the graph that is being traced will be converted to ONNX, which lacks some of PyTorch's operators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_open: list[None] = []


@contextmanager
def tracing_for_onnx() -> Iterator[None]:
    """Context for `torch.export.export` of a program that `torch.onnx.export` converts later."""
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()


def for_onnx() -> bool:
    """Whether ONNX's operators are wanted: inside `tracing_for_onnx` and `torch.onnx.export`."""
    return len(_open) > 0 or torch.onnx.is_in_onnx_export()
