"""A second device that needs no hardware: tensors there are computed on the CPU, and never together with one from here.

Where a machine has no GPU this finds what would stop on one: a tensor that was left behind. The device goes by the name
of torch's `meta`, of which autograd asks for no stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default}
# torch lets indices, masks among them, lie on the CPU
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default}


class Mixed(RuntimeError):
    """An operator was given tensors of both devices."""


class Elsewhere(Tensor):
    """A tensor of the second device; `here` is what it stands for."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        like = {
            "dtype": here.dtype,
            "device": DEVICE,
            "strides": here.stride(),
            "storage_offset": here.storage_offset(),
        }
        made = Tensor._make_wrapper_subclass(cls, here.shape, **like, requires_grad=here.requires_grad)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise Mixed("numpy knows no tensors of another device: .cpu() first")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.here!r})"


class Written(TorchFunctionMode):
    """Numbers of Python become tensors below what a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(given.get("device") or "cpu").type == DEVICE.type:
            found = func(*args, **{**given, "device": "cpu"})
            return found if isinstance(found, Elsewhere) else Elsewhere(found)
        if func is Tensor.__setitem__ and isinstance(args[0], Elsewhere) and isinstance(args[2], bool | int | float):
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        if func is Tensor.__getitem__ and isinstance(args[0], Elsewhere):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(place) if isinstance(place, list) else place for place in places))
        return func(*args, **given)


class Device(TorchDispatchMode):
    """Within, `torch.device("meta")` is the second device."""

    def __enter__(self) -> Device:
        self.written = Written()
        self.written.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.written.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator gives, on the device that its tensors or its `device` say."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    assert all(isinstance(each, Elsewhere) or not each.is_meta for each in tensors), f"{func} lost a tensor's values"
    there = any(isinstance(each, Elsewhere) for each in tensors)
    if there and func not in CROSSING:
        checked(func, args, kwargs)
    target = kwargs.get("device")
    if func is torch.ops.aten.copy_.default or target is None:
        there = isinstance(tensors[0], Elsewhere) if func is torch.ops.aten.copy_.default else there
    else:
        there = torch.device(target).type == DEVICE.type
    given = {key: "cpu" if key == "device" and value is not None else value for key, value in kwargs.items()}
    inner_args, inner_kwargs = tree_map_only(Elsewhere, lambda each: each.here, (args, given))
    found = func(*inner_args, **inner_kwargs)
    if not there:
        return found
    out = tree_map_only(Tensor, lambda each: each if isinstance(each, Elsewhere) else Elsewhere(each), found)
    return return_and_correct_aliasing(func, args, kwargs, out) if tensors else out


def checked(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises Mixed where a tensor that is no single number lies on the CPU beside one of the second device."""
    looked = (args[0], args[2:]) if func in INDEXED else (args, kwargs)
    left = [each for each in tree_flatten(looked)[0] if isinstance(each, Tensor) and not isinstance(each, Elsewhere)]
    if any(each.dim() for each in left):
        raise Mixed(f"{func} was given {[tuple(each.shape) for each in left]} from the CPU, the others from elsewhere")
