"""Stand-ins for the content of a file that was described but not read."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CheckpointError

DEEPEST = 32  # nested levels of what a file holds
MOST = 2**20  # opcodes of a pickle, and values that it makes: 1,000 tensors, their moments and average take 150,000
LONGEST = 1000  # characters of a tensor's name: those of detectors have a hundred
UNFOLDS = 8  # how many times its own size a file may declare: tensors may share memory


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
    """Something harmless that has no plain form, such as a NumPy array; `detail` is what is known of it."""

    name: str
    detail: Any = None


class Record(dict):
    """Attributes of an instance, by name."""


def plain(value: Any) -> Any:
    """A value that passed `check`, in a form that JSON can hold."""
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
    """Check the content of a file of `size` bytes.

    Raises CheckpointError where it is nested too deeply or in itself, where references expand it too far, where its
    tensors are far larger than the file or than any memory, or where their names are too long.
    """
    tensors: dict[int, TensorInfo] = {}
    if _values(content, 0, {}, tensors) > MOST:
        raise CheckpointError(f"expands to more than {MOST:,} values: refused")
    for tensor in tensors.values():
        # torch multiplies all sides, even where one of them is 0
        if math.prod(max(side, 1) for side in tensor.shape) * tensor.dtype.itemsize >= 2**63:
            raise CheckpointError(f"declares a tensor of shape {str(tensor.shape)[:200]}, which is too large: refused")
    declared = sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors.values())
    if declared > UNFOLDS * size + 2**20:
        raise CheckpointError(f"declares {declared:,} bytes of tensors in a file of {size:,} bytes: refused")


def _values(item: Any, depth: int, counts: dict[int, int], tensors: dict[int, TensorInfo]) -> int:
    """How many values an item consists of when everything that it refers to is written out."""
    if isinstance(item, TensorInfo):
        tensors[id(item)] = item
    if not isinstance(item, (dict, list, tuple)):
        return 1
    if id(item) not in counts:
        if depth > DEEPEST:
            raise CheckpointError(f"holds data nested more than {DEEPEST} levels deep: refused")
        counts[id(item)] = MOST + 1  # until it is counted: what contains itself has no end
        inner = item.values() if isinstance(item, dict) else item
        if isinstance(item, dict):
            _check_names(item)
        counts[id(item)] = 1 + sum(_values(value, depth + 1, counts, tensors) for value in inner)
    return counts[id(item)]


def _check_names(mapping: dict[Any, Any]) -> None:
    for name, value in mapping.items():
        if isinstance(value, TensorInfo) and isinstance(name, str) and len(name) > LONGEST:
            said = f"{name[:40]!r} ... of {len(name):,} characters"
            raise CheckpointError(f"has a tensor with a name of more than {LONGEST:,} characters, {said}: refused")
