"""Tensors in other layouts: tables of relative positions, kernels of 1 x 1 convolutions."""

import math

import torch
from torch import Tensor

from ..convert import Change


def swin_table(table: Tensor) -> Tensor:
    """From Swin's form, ((2h-1) * (2w-1), heads) by query - key, to ours, (heads, 2h-1, 2w-1) by key - query.

    If the number of entries is not a square, it does not tell h from w: the table stays flat, (heads, entries).
    """
    table = table.flip(0).T.contiguous()
    side = round(table.shape[1] ** 0.5)
    return table.unflatten(1, (side, side)) if side * side == table.shape[1] else table


def to_swin_table(table: Tensor) -> Tensor:
    return table.flatten(1).T.flip(0).contiguous()


def swin_index(table: Tensor) -> Tensor:
    """Swin's index table for ((2w-1)**2, heads) relative positions, (w*w, w*w): where query - key is in that table.

    The windows are taken to be square: 9 x 25 positions, of windows of 5 x 13, are as many as 15 x 15.
    """
    return _index(table.shape[0]).T.contiguous()


def natten_index(table: Tensor) -> Tensor:
    """The same for a table (heads, 2w-1, 2w-1) by key - query. Raises ValueError for windows that are not square."""
    if table.shape[1] != table.shape[2]:
        sides = f"{table.shape[1]} x {table.shape[2]}"
        raise ValueError(f"a table of {sides} relative positions is not for square windows, as this layout's are")
    return _index(table.shape[1] * table.shape[2])


def _index(entries: int) -> Tensor:
    """(w*w, w*w), from query and key to key - query among the entries of a table for square windows."""
    side = math.isqrt(entries)
    if side * side != entries:
        raise ValueError(
            f"a table of {entries} relative positions is not for square windows, and its sides are unknown"
        )
    window = (side + 1) // 2
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (w*w, 2)
    apart = places[None] - places[:, None] + window - 1  # (query, key, 2)
    return apart[..., 0] * side + apart[..., 1]


SWIN = Change(swin_table, to_swin_table)
# convolutions with a 1 x 1 kernel there, linear layers here, and the reverse
KERNEL = Change(lambda weight: weight[:, :, 0, 0], lambda weight: weight[:, :, None, None])
LINEAR = Change(KERNEL.to_theirs, KERNEL.to_ours)
