"""What stands for the content of a file that was described and not read."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CheckpointError

DEEPEST = 32  # nested levels of what a file holds
MOST = 2**20  # opcodes of a pickle, and values that it makes: 1,000 tensors, their moments and average take 150,000
LONGEST = 1000  # letters of a tensor's name: those of detectors have a hundred
UNFOLDS = 8  # how many times its own bytes a file may declare: tensors may share memory


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements in the file."""

    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """A tensor of the file that was not read: its type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def meta(self) -> torch.Tensor:
        """A tensor of this type and shape without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass
class Other:
    """Something harmless that has no plain form, an array of numpy's say; `detail` is what is known of it."""

    name: str
    detail: Any = None


class Record(dict):
    """Attributes of an instance, by name."""


def plain(value: Any) -> Any:
    """What JSON can hold of a value that `check` let through."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, TensorInfo):
        return f"tensor {value.shape}"
    return getattr(value, "text", f"<{getattr(value, 'name', type(value).__name__)}>")


def check(content: Any, size: int) -> None:
    """Look through what a file of `size` bytes holds.

    Raises CheckpointError where it is nested too deep or in itself, where references make much of little, where its
    tensors are far larger than the file or than any memory, or their names are of no use.
    """
    tensors: dict[int, TensorInfo] = {}
    if _values(content, 0, {}, tensors) > MOST:
        raise CheckpointError(f"unfolds to more than {MOST:,} values: refused")
    for tensor in tensors.values():
        # torch computes with all sides, those beside one of 0 too
        if math.prod(max(side, 1) for side in tensor.shape) * tensor.dtype.itemsize >= 2**63:
            raise CheckpointError(f"declares a tensor of shape {str(tensor.shape)[:200]}, which none has: refused")
    declared = sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors.values())
    if declared > UNFOLDS * size + 2**20:
        raise CheckpointError(f"declares {declared:,} bytes of tensors in a file of {size:,}: refused")


def _values(item: Any, depth: int, counts: dict[int, int], tensors: dict[int, TensorInfo]) -> int:
    """How many values an item is when everything that it refers to is written out."""
    if isinstance(item, TensorInfo):
        tensors[id(item)] = item
    if not isinstance(item, (dict, list, tuple)):
        return 1
    if id(item) not in counts:
        if depth > DEEPEST:
            raise CheckpointError(f"holds data nested more than {DEEPEST} levels deep: refused")
        counts[id(item)] = MOST + 1  # until it is counted: who finds itself inside itself has no end
        inner = item.values() if isinstance(item, dict) else item
        if isinstance(item, dict):
            _check_names(item)
        counts[id(item)] = 1 + sum(_values(value, depth + 1, counts, tensors) for value in inner)
    return counts[id(item)]


def _check_names(mapping: dict[Any, Any]) -> None:
    for name, value in mapping.items():
        if isinstance(value, TensorInfo) and isinstance(name, str) and len(name) > LONGEST:
            said = f"{name[:40]!r} ... of {len(name):,} letters"
            raise CheckpointError(f"has a tensor with a name over {LONGEST:,} letters, {said}: refused")
