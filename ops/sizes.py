"""Sizes of maps that a compiler may not know: written so that one graph serves all of them.

`torch.compile` keeps sizes symbolic once it has seen two of them. A branch on a remainder is then a guard, and a graph
of its own for every remainder; and views of a side that is not known to be a product take it minutes to verify.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ceil(side: int, size: int) -> int:
    """side / size, rounded up; ONNX rounds a division of negative numbers towards zero, Python down."""
    return (side + size - 1) // size


def covering(side: int, size: int) -> int:
    """The least multiple of `size` that is no less than `side`, as the product that it is."""
    return ceil(side, size) * size


def surely(holds: bool) -> bool:
    """Whether a condition on sizes holds; while a compiler looks on, whether it holds for all sizes of its graph.

    Asking adds no guard.
    """
    if torch.jit.is_scripting():
        return holds
    else:
        return _known(holds) if torch.compiler.is_compiling() else holds


def varies(size: int) -> bool:
    """Whether a compiler looks on whose graph is for many values of a size: what depends on it must not be a branch."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not _fixed(size)


def alike(one: list[int], other: list[int]) -> bool:
    """Whether two shapes surely are the same."""
    same = len(one) == len(other)
    for i in range(len(one)):
        same = same and surely(one[i] == other[i])
    return same


def cropped(x: Tensor, H: int, W: int) -> Tensor:
    """The first H rows and W columns of (B, H', W', ..., C); as a copy where a slice would be guarded on."""
    if compiled_for_any(x.shape[1] == H) or compiled_for_any(x.shape[2] == W):
        return F.pad(x, [0, 0] * (x.dim() - 3) + [0, W - x.shape[2], 0, H - x.shape[1]])
    return x[:, :H, :W]


def laid_out(x: Tensor) -> Tensor:
    """`x`, before its axes are flattened: copied where a compiler looks on for many sizes, and as it lies elsewhere.

    Whether a side of one lets axes be flattened without a copy would be guarded on.
    """
    return x.clone(memory_format=torch.contiguous_format) if varies(x.numel()) else x


def _fixed(size: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # as below

    return has_static_value(size)


def _known(holds: bool) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes its time: only to compile

    return statically_known_true(holds)


def compiled_for_any(holds: bool) -> bool:
    """Whether a compiler looks on whose graph is for sizes where the condition holds, and for others."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not surely(holds)
