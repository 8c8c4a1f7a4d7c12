"""Checks of arguments that several ops share."""

import torch
from torch import Tensor

from .dispatch import watched


def factor(scale: float | None, D: int) -> float:
    """`scale` of the logits, by default that of D channels. Raises ValueError for one that learns, or is many numbers.

    Fused attention takes a number, and where it does not run a learned scale would lose its gradient without a word.
    One number as a tensor, or NumPy's, becomes Python's, as kernels want it; what is watched runs as operators, which
    do that themselves.
    """
    if not torch.jit.is_scripting():
        if isinstance(scale, Tensor) and (scale.requires_grad or scale.dim() > 0):
            raise ValueError("scale is a tensor: expected a number; multiply q by a learned scale, or by one a head")
        if scale is not None and type(scale) is not float and not watched():
            return float(scale)
    return D**-0.5 if scale is None else scale


def check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless all three are (B, H, W, heads, D) of one shape, of at least 1 x 1 pixels."""
    if q.dim() != 5 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k, v are {q.shape}, {k.shape}, {v.shape}: expected one shape (B, H, W, heads, D)")
    check_pixels("q", q)


def check_pixels(name: str, x: Tensor) -> None:
    """Raises ValueError for a map (B, H, W, ...) without pixels; its batch may be empty."""
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{name} is {x.shape}: expected a map of at least 1 x 1 pixels")


def check_bias(bias: Tensor | None, heads: int, wh: int, ww: int) -> None:
    """Raises ValueError unless `bias` is None or a table (heads, 2*wh - 1, 2*ww - 1)."""
    if bias is not None and list(bias.shape) != [heads, 2 * wh - 1, 2 * ww - 1]:
        raise ValueError(
            f"bias is {bias.shape}: expected (heads, 2*wh-1, 2*ww-1), "
            f"({heads}, {2 * wh - 1}, {2 * ww - 1}) for window {wh} x {ww}"
        )


def check_outside(outside: tuple[Tensor, Tensor] | None, heads: int, D: int) -> None:
    """Raises ValueError unless `outside` is None or a key and a value (heads, D)."""
    if outside is not None:
        k0, v0 = outside
        if list(k0.shape) != [heads, D] or list(v0.shape) != [heads, D]:
            raise ValueError(f"outside is {k0.shape} and {v0.shape}: expected both (heads, D), ({heads}, {D})")


def check_numbers(name: str, given: Tensor, count: int) -> None:
    """Raises ValueError for numbers other than 0 ... count - 1, which would lead to another image's values.

    Where that costs no wait: on a CPU, and where nothing but autograd looks on.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what stands behind an `and`)
        if given.is_cpu and given.numel() > 0 and not watched(given):
            least, most = given.aminmax()
            if least < 0 or most >= count:
                raise ValueError(f"{name} has numbers from {int(least)} to {int(most)}: expected 0 to {count - 1}")
