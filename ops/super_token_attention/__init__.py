"""Super tokens: pixels are averaged into a coarse grid of tokens, which are later spread back to the pixels.

There are two ops, because the model applies projected attention among the super tokens between them.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_channels, check_devices, check_map, pair, whole
from ..dispatch import choose
from ..sizes import ceil
from . import reference
from .torch_path import associate as torch_associate
from .torch_path import scatter as torch_scatter


def super_tokens(
    x: Tensor,
    cell: int | tuple[int, int],
    iterations: int = 1,
    differentiable: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Averages the map into one super token per cell, each pixel shared among the 3 x 3 cells around its own.

    Super tokens start as the means of their cells. Then, `iterations` times,

        affinity[i, m] = softmax_m(C ** -0.5 * x[i] . token[m]),   m in the 3 x 3 cells around pixel i
        token[m] = sum_i affinity[i, m] x[i] / (sum_i affinity[i, m] + 1e-12)

    A cell beyond the grid has logit 0 and takes its share, which is lost. Where the cell does not divide the map, the
    map is padded with zeros at the bottom and right, and these pixels count in the means and in the denominator.

    x               (B, H, W, C), any strides
    cell            pixels of a super token, for both axes or (down, across)
    iterations      at least 1
    differentiable  False, as published: gradients treat affinity and denominator as constants, and reach x only through
                    the pixels that the last step averages. With True they overflow in float16 where hardly any pixel
                    is near to a token
    returns         tokens (B, ceil(H / cell[0]), ceil(W / cell[1]), C), and the last affinity (B, H, W, 9); entry
                    3 * (dy + 1) + (dx + 1) belongs to the cell dy below and dx right of the pixel's own

    Raises ValueError for an invalid shape, dtype, cell or number of iterations, and what `ops.dispatch.choose` raises
    for `impl`.
    Source: STViT, https://arxiv.org/abs/2211.11167, section 3.2.
    """
    cell_ = pair("cell", cell)
    _check_cell(cell_)
    if x.dim() != 4:
        raise ValueError(f"x is {x.shape}: expected (B, H, W, C)")
    check_map("x", x)
    iterations = whole("iterations", iterations)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: expected at least 1")
    if torch.jit.is_scripting():
        return torch_associate(x, cell_, iterations, differentiable)
    else:
        associate = {"triton": _triton_associate, "torch": torch_associate, "reference": reference.associate}
        name = choose(impl, x, op="super_tokens", channels=None)
        return associate[name](x, cell_, iterations, differentiable)


def scatter_super_tokens(tokens: Tensor, affinity: Tensor, cell: int | tuple[int, int], impl: str = "auto") -> Tensor:
    """Spreads super tokens back: each pixel is the sum of the 3 x 3 tokens around it, weighted by its affinity.

        out[i] = sum_m affinity[i, m] tokens[m],   tokens beyond the grid are zero

    tokens     (B, h, w, C)
    affinity   (B, H, W, 9), as `super_tokens` returns it; H and W give the map size. Cast to the dtype of tokens
    cell       pixels of a super token, for both axes or (down, across)
    returns    (B, H, W, C)

    Raises ValueError for invalid shapes and dtypes, and what `ops.dispatch.choose` raises for `impl`.
    Source: STViT, https://arxiv.org/abs/2211.11167, equation 8.
    """
    cell_ = pair("cell", cell)
    _check_cell(cell_)
    fits = tokens.dim() == 4 and affinity.dim() == 4 and affinity.shape[3] == 9
    if fits:
        h, w = ceil(affinity.shape[1], cell_[0]), ceil(affinity.shape[2], cell_[1])
        fits = list(tokens.shape[:3]) == [affinity.shape[0], h, w]
    if not fits:
        raise ValueError(
            f"tokens are {tokens.shape} and affinity {affinity.shape}: expected (B, ceil(H/{cell_[0]}), "
            f"ceil(W/{cell_[1]}), C) and (B, H, W, 9)"
        )
    check_map("affinity", affinity)
    check_channels("tokens", tokens)
    check_devices("tokens, affinity", [tokens, affinity])
    affinity = affinity.to(tokens.dtype)
    if torch.jit.is_scripting():
        return torch_scatter(tokens, affinity, cell_)
    else:
        scatter = {"triton": _triton_scatter, "torch": torch_scatter, "reference": reference.scatter}
        name = choose(impl, tokens, op="scatter_super_tokens", channels=None)
        return scatter[name](tokens, affinity, cell_)


def _triton_associate(*args: Any) -> tuple[Tensor, Tensor]:
    from .triton_path import associate  # triton is only imported where it runs

    return associate(*args)


def _triton_scatter(*args: Any) -> Tensor:
    from .triton_path import scatter  # as above

    return scatter(*args)


def _check_cell(cell: tuple[int, int]) -> None:
    if cell[0] < 1 or cell[1] < 1:
        raise ValueError(f"cell is {cell[0]} x {cell[1]}: expected at least 1 x 1")
