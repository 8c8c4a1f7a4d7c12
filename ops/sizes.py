"""Arithmetic on map sizes that may be symbolic in a compiler, written so that one graph serves all of them.

`torch.compile` keeps sizes symbolic once it has seen two of them. A branch on a remainder then becomes a guard, with a
separate graph for every remainder, and views of a side that is not known to be a product take minutes to verify.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ceil(side: int, size: int) -> int:
    """side / size, rounded up; not as -(-side // size), since ONNX rounds negative quotients towards zero."""
    return (side + size - 1) // size


def covering(side: int, size: int) -> int:
    """The smallest multiple of `size` that is at least `side`, written as a product."""
    return ceil(side, size) * size


def surely(holds: bool) -> bool:
    """Whether a condition on sizes holds; under a compiler, whether it holds for all sizes of the graph.

    This adds no guard.
    """
    if torch.jit.is_scripting():
        return holds
    else:
        return _known(holds) if torch.compiler.is_compiling() else holds


def varies(size: int) -> bool:
    """Whether a compiler is tracing a graph in which this size is symbolic, so that code must not branch on it."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not _fixed(size)


def alike(one: list[int], other: list[int]) -> bool:
    """Whether two shapes are `surely` equal."""
    same = len(one) == len(other)
    for i in range(len(one)):
        same = same and surely(one[i] == other[i])
    return same


def cropped(x: Tensor, H: int, W: int) -> Tensor:
    """The first H rows and W columns of (B, H', W', ..., C); as a copy where a slice would add a guard."""
    if compiled_for_any(x.shape[1] == H) or compiled_for_any(x.shape[2] == W):
        # contiguous, as compilers take the result for contiguous, whereas F.pad keeps the order of strides
        return F.pad(x.contiguous(), [0, 0] * (x.dim() - 3) + [0, W - x.shape[2], 0, H - x.shape[1]])
    return x[:, :H, :W]


def filled(x: Tensor, sides: tuple[int, int], value: float = 0.0) -> Tensor:
    """(B, H, W, ..., C) with `value` at the bottom and right, up to multiples of `sides`."""
    H, W = x.shape[1], x.shape[2]
    down, right = covering(H, sides[0]) - H, covering(W, sides[1]) - W
    if surely(down == 0) and surely(right == 0):
        return x
    return F.pad(x, [0, 0] * (x.dim() - 3) + [0, right, 0, down], value=value)


def laid_out(x: Tensor) -> Tensor:
    """`x`, as a contiguous clone if its size is symbolic in a compiler.

    flatten() first tests whether a dimension is 1, in which case it needs no copy. With symbolic sizes that test would
    add a guard, which a contiguous clone avoids.
    """
    return x.clone(memory_format=torch.contiguous_format) if varies(x.numel()) else x


def _fixed(size: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # as below

    return has_static_value(size)


def _known(holds: bool) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import: only when compiling

    return statically_known_true(holds)


def compiled_for_any(holds: bool) -> bool:
    """Whether a compiler is tracing a graph for sizes of which some meet the condition and others may not."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not surely(holds)
