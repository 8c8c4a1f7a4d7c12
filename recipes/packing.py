"""Split nested state dicts, such as an optimiser's, into tensors and JSON, and reassemble them. No pickles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Move the tensors of nested dicts, lists and tuples into `tensors`; returns plain JSON that refers to them.

    Values that JSON supports stay as they are; a dtype becomes its name.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        items = [[key, pack(value, tensors, f"{name}.{key}".lstrip("."))] for key, value in tree.items()]
        return {"dict": items}  # as pairs, because JSON would turn the integer keys of optimisers into strings
    if isinstance(tree, (list, tuple)):
        items = [pack(value, tensors, f"{name}.{i}".lstrip(".")) for i, value in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    return {"value": tree}


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`; tuples in older files come back as lists, as they were written.

    Raises ValueError for a dtype that torch does not have.
    """
    kind, value = next(iter(tree.items()))
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](unpack(item, tensors) for item in value)
    if kind == "dtype":
        return _dtype(value)
    return value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} in the state of an optimiser is not a dtype of torch")
    return found
