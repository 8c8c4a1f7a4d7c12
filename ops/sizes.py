"""Sizes of maps that a compiler may not know: written so that one graph serves all of them.

`torch.compile` keeps sizes symbolic once it has seen two of them. A branch on a remainder is then a guard, and a graph
of its own for every remainder; and views of a side that is not known to be a product take it minutes to verify.
"""

import torch


def covering(side: int, size: int) -> int:
    """The least multiple of `size` that is no less than `side`, as the product that it is."""
    return (side + size - 1) // size * size


def surely(holds: bool) -> bool:
    """Whether a condition on sizes holds; while a compiler looks on, whether it holds for all sizes of its graph.

    Asking adds no guard.
    """
    if torch.jit.is_scripting():
        return holds
    else:
        return _known(holds) if torch.compiler.is_compiling() else holds


def _known(holds: bool) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes its time: only to compile

    return statically_known_true(holds)


def compiled_for_any(holds: bool) -> bool:
    """Whether a compiler looks on whose graph is for sizes where the condition holds, and for others."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not surely(holds)
