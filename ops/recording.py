"""Records kernel launches instead of running them. Needs neither a GPU nor triton."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

_records: list[list["Launch"]] = []


@dataclass(frozen=True)
class Launch:
    """One launch without its data: `values` are the arguments in order, with a dtype in place of each tensor."""

    kernel: Any
    values: tuple
    constants: tuple[tuple[str, Any], ...]

    def __reduce__(self) -> tuple[Callable, tuple]:
        """A kernel is pickled by name."""
        return _named, (self.kernel.fn.__module__, self.kernel.fn.__name__, self.values, self.constants)


def _named(module: str, name: str, values: tuple, constants: tuple) -> Launch:
    return Launch(getattr(import_module(module), name), values, constants)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Context in which ops called with meta tensors select their kernels, whose launches are recorded in order.

    with recording() as launches:
        model(torch.empty(2, 3, 224, 224, device="meta")).sum().backward()
    """
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def is_recording() -> bool:
    return len(_records) > 0


def write_down(kernel: Any, values: tuple, constants: dict[str, Any]) -> None:
    described = tuple(value.dtype if isinstance(value, Tensor) else value for value in values)
    _records[-1].append(Launch(kernel, described, tuple(constants.items())))
