"""Super tokens: pixels are gathered into a coarse grid of tokens, and what those learn is spread back to the pixels.

Two ops, because a projected attention among the super tokens stands between them.
"""

import torch
from torch import Tensor

from ..checks import check_channels, check_map, pair
from ..dispatch import choose
from ..sizes import ceil
from . import reference
from .torch_path import associate as torch_associate
from .torch_path import scatter as torch_scatter

HAS = ("triton", "torch", "reference")


def super_tokens(
    x: Tensor,
    cell: int | tuple[int, int],
    iterations: int = 1,
    differentiable: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Averages the map into one super token a cell, each pixel shared among the 3 x 3 cells around its own.

    Super tokens start as the means of their cells. Then, `iterations` times,

        affinity[i, m] = softmax_m(C ** -0.5 * x[i] . token[m]),   m the 3 x 3 cells around the pixel i
        token[m] = sum_i affinity[i, m] x[i] / (sum_i affinity[i, m] + 1e-12)

    A cell beyond the grid has logit 0 and takes its share, which is lost. Where the cell does not divide the map, the
    map is extended with zeros at the bottom and right, and these pixels count in the means and in the denominator.

    x               (B, H, W, C), any strides
    cell            pixels of a super token, for both axes or (down, across)
    iterations      at least 1
    differentiable  False, as published: affinity and denominator are constants to the gradient, which reaches x only
                    as the pixels averaged by the last step
    returns         tokens (B, ceil(H / cell[0]), ceil(W / cell[1]), C), and affinity (B, H, W, 9), the last one; entry
                    3 * (dy + 1) + (dx + 1) belongs to the cell dy below and dx right of the pixel's own

    Raises ValueError for a shape, dtype, cell or iterations that do not fit, and what `ops.dispatch.choose` raises for
    `impl`.
    Source: STViT, https://arxiv.org/abs/2211.11167, section 3.2.
    """
    cell_ = pair("cell", cell)
    _check_cell(cell_)
    if x.dim() != 4:
        raise ValueError(f"x is {x.shape}: expected (B, H, W, C)")
    check_map("x", x)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: expected at least 1")
    if torch.jit.is_scripting():
        return torch_associate(x, cell_, iterations, differentiable)
    else:
        associate = {"triton": _triton_associate, "torch": torch_associate, "reference": reference.associate}
        name = choose(impl, x, op="super_tokens", has=HAS, channels=None)
        return associate[name](x, cell_, iterations, differentiable)


def scatter_super_tokens(tokens: Tensor, affinity: Tensor, cell: int | tuple[int, int], impl: str = "auto") -> Tensor:
    """Spreads super tokens back: each pixel is the sum of the 3 x 3 tokens around it, weighed by its affinity.

        out[i] = sum_m affinity[i, m] tokens[m],   tokens beyond the grid are zero

    tokens     (B, h, w, C)
    affinity   (B, H, W, 9), as `super_tokens` returns it; H and W say how large the map is. Cast to the dtype of tokens
    cell       pixels of a super token, for both axes or (down, across)
    returns    (B, H, W, C)

    Raises ValueError for shapes and dtypes that do not fit, and what `ops.dispatch.choose` raises for `impl`.
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
    affinity = affinity.to(tokens.dtype)
    if torch.jit.is_scripting():
        return torch_scatter(tokens, affinity, cell_)
    else:
        scatter = {"triton": _triton_scatter, "torch": torch_scatter, "reference": reference.scatter}
        name = choose(impl, tokens, op="scatter_super_tokens", has=HAS, channels=None)
        return scatter[name](tokens, affinity, cell_)


def _triton_associate(x: Tensor, cell: tuple[int, int], iterations: int, learned: bool) -> tuple[Tensor, Tensor]:
    from .triton_path import associate  # triton is imported where it runs, and only there

    return associate(x, cell, iterations, learned)


def _triton_scatter(tokens: Tensor, affinity: Tensor, cell: tuple[int, int]) -> Tensor:
    from .triton_path import scatter  # as above

    return scatter(tokens, affinity, cell)


def _check_cell(cell: tuple[int, int]) -> None:
    if cell[0] < 1 or cell[1] < 1:
        raise ValueError(f"cell is {cell[0]} x {cell[1]}: expected at least 1 x 1")
