"""Argument checks shared by several ops."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .dispatch import autocasts, watched

WHOLE = (int, Integral, torch.SymInt)  # a tuple, since the compiler of torch 2.9 cannot trace a union


def factor(scale: float | None, D: int) -> float:
    """The scale of the logits, by default D ** -0.5. Raises ValueError if it is learned or has several elements.

    Fused attention takes a number, and elsewhere a learned scale would silently lose its gradient. A one-element tensor
    or a NumPy number becomes a Python float, as kernels need it. Watched calls run as operators, which convert it
    themselves. A size that a trace records is a tensor, whose root would be rounded to float32.
    """
    if not torch.jit.is_scripting():
        if isinstance(scale, Tensor) and (scale.requires_grad or scale.dim() > 0):
            raise ValueError("scale is a tensor: expected a number; multiply q by a learned or per-head scale")
        if scale is not None and type(scale) is not float and not watched():
            return real(scale)
        if isinstance(D, Tensor):
            D = D.double()
    return D**-0.5 if scale is None else scale


def real(scale: Any) -> float:
    """A number of another kind as a Python float. Raises ValueError for anything else, complex numbers included."""
    try:
        if isinstance(scale, complex | str | bytes) or (isinstance(scale, Tensor) and scale.is_complex()):
            raise TypeError("not a real number")
        return float(scale)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"scale is {shown(scale)}: expected a number") from error


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) from one number for both, or from two numbers. Raises ValueError for anything else."""
    if not torch.jit.is_scripting():
        return both(name, value)
    elif isinstance(value, int):
        return (value, value)
    else:
        return value


def both(name: str, value: Any) -> tuple[int, int]:
    """`pair` outside TorchScript."""
    if type(value) is int:
        return value, value
    if isinstance(value, tuple) and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    numbers = value if isinstance(value, Sequence) else (value, value)
    if len(numbers) != 2 or not all(map(is_whole, numbers)):
        raise ValueError(f"{name} is {shown(value)}: expected one whole number, or two: (rows, columns)")
    return pythons(numbers[0]), pythons(numbers[1])


def whole(name: str, value: int) -> int:
    """A whole number; of NumPy, as a Python int. Raises ValueError for anything else."""
    if torch.jit.is_scripting():
        return value
    else:
        return one(name, value)


def one(name: str, value: Any) -> int:
    """`whole` outside TorchScript."""
    if not is_whole(value):
        raise ValueError(f"{name} is {shown(value)}: expected a whole number")
    return pythons(value)


def shown(value: Any) -> str:
    """A wrong argument for a message; of a tensor or an array with more than two numbers its shape.

    A compiler cannot trace how arrays are printed, and takes NumPy's numbers for arrays: it gets the name of the type.
    """
    if torch.compiler.is_compiling():
        return f"a {type(value).__name__}"
    shape = getattr(value, "shape", ())
    if isinstance(shape, tuple) and math.prod(shape) > 2:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return repr(value)


def is_whole(number: Any) -> bool:
    """Whether it is an integer: of Python, of NumPy, or a size that a compiler or a trace records."""
    if isinstance(number, bool):
        return False
    return isinstance(number, WHOLE) or (torch.jit.is_tracing() and isinstance(number, Tensor))


def pythons(number: Any) -> int:
    """A NumPy integer as a Python int; Python ints and recorded sizes are returned as they are."""
    return number if isinstance(number, int) or not isinstance(number, Integral) else int(number)


def check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless all three are maps (B, H, W, heads, D) of one shape and dtype."""
    if q.dim() != 5 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k, v are {q.shape}, {k.shape}, {v.shape}: expected one shape (B, H, W, heads, D)")
    check_map("q", q)
    check_dtypes("q, k, v", [q, k, v])


def check_map(name: str, x: Tensor) -> None:
    """Raises ValueError for a map (B, H, W, ...) without pixels, and like `check_channels`; the batch may be empty."""
    sizes = x.shape
    if sizes[1] == 0 or sizes[2] == 0:
        raise ValueError(f"{name} is {x.shape}: expected a map of at least 1 x 1 pixels")
    check_channels(name, x)


def check_channels(name: str, x: Tensor) -> None:
    """Raises ValueError for a map (B, H, W, C) or (B, H, W, heads, D) without channels, and like `check_kind`."""
    sizes = x.shape
    if sizes[3] == 0 or sizes[-1] == 0:
        raise ValueError(f"{name} is {x.shape}: expected at least one head of at least one channel")
    check_kind(name, x)


def check_kind(name: str, x: Tensor) -> None:
    """Raises ValueError for dtypes that ops do not support, such as integers or 8-bit floats."""
    if not x.is_floating_point() or x.element_size() == 1:
        raise ValueError(f"{name} is {x.dtype}: expected float16, bfloat16, float32 or float64")


def check_dtypes(names: str, given: list[Tensor]) -> None:
    """Raises ValueError for different dtypes, except where autocast casts them to one (never float64), or devices."""
    check_devices(names, given)
    if not torch.jit.is_scripting():
        dtype = given[0].dtype
        for t in given:
            if t.dtype != dtype:
                dtypes = [t.dtype for t in given]
                if torch.float64 in dtypes or not autocasts(t):
                    raise ValueError(f"{names} are {', '.join(map(str, dtypes))}: expected one dtype")


def check_devices(names: str, given: list[Tensor]) -> None:
    """Raises ValueError for tensors on different devices: products of a meta tensor and another one would be random."""
    device = given[0].device
    for t in given:
        if t.device != device:
            raise ValueError(f"{names} are on {', '.join([str(t.device) for t in given])}: expected one device")


def check_bias(bias: Tensor | None, x: Tensor, wh: int, ww: int) -> None:
    """Raises ValueError unless `bias` is None or a table (heads, 2*wh - 1, 2*ww - 1) for the map `x`.

    Also like `check_kind` and `check_devices`.
    """
    if bias is not None:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
            if not isinstance(bias, Tensor):
                raise ValueError(f"bias is {shown(bias)}: expected a table (heads, 2*wh-1, 2*ww-1)")
        heads = x.shape[3]
        if list(bias.shape) != [heads, 2 * wh - 1, 2 * ww - 1]:
            raise ValueError(
                f"bias is {bias.shape}: expected (heads, 2*wh-1, 2*ww-1), "
                f"({heads}, {2 * wh - 1}, {2 * ww - 1}) for window {wh} x {ww}"
            )
        check_kind("bias", bias)
        check_devices("the map and bias", [x, bias])


def check_outside(outside: tuple[Tensor, Tensor] | None, x: Tensor) -> None:
    """Raises ValueError unless `outside` is None or a key and a value (heads, D) for the map `x`.

    Also like `check_kind` and `check_devices`.
    """
    if outside is not None:
        heads, D = x.shape[3], x.shape[4]
        if not torch.jit.is_scripting():
            check_two(outside)
        k0, v0 = outside
        if list(k0.shape) != [heads, D] or list(v0.shape) != [heads, D]:
            raise ValueError(f"outside is {k0.shape} and {v0.shape}: expected both (heads, D), ({heads}, {D})")
        check_kind("the key outside", k0)
        check_kind("the value outside", v0)
        check_devices("the map, the key and the value outside", [x, k0, v0])


def check_two(outside: Any) -> None:
    """`check_outside` for what TorchScript checks itself: that `outside` is two tensors."""
    several = isinstance(outside, Sequence)
    if not several or len(outside) != 2 or not all(isinstance(t, Tensor) for t in outside):
        given = f"({', '.join([type(t).__name__ for t in outside])})" if several else shown(outside)
        raise ValueError(f"outside is {given}: expected (k0, v0), a key and a value, each (heads, D)")


def check_numbers(name: str, given: Tensor, x: Tensor, count: int) -> None:
    """Raises ValueError for indices other than 0 ... count - 1, which would read another image's values, and like
    `check_devices` if they are not where the map `x` is.

    Values are only checked where that needs no synchronisation: on a CPU, and in calls that are not `watched`.
    """
    if given.dtype != torch.int64 and given.dtype != torch.int32:
        raise ValueError(f"{name} is {given.dtype}: expected int64")
    check_devices(f"the map and {name}", [x, given])
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if given.is_cpu and given.numel() > 0 and not watched(given):
            least, most = (int(t) for t in given.aminmax())  # comparing tensors takes longer
            if least < 0 or most >= count:
                raise ValueError(f"{name} has values from {least} to {most}: expected 0 to {count - 1}")
