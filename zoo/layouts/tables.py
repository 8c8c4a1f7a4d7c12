"""Tables of relative positions as others write them."""

from torch import Tensor


def swin_table(table: Tensor) -> Tensor:
    """Swin's way, ((2h-1) * (2w-1), heads) by query - key, to ours, (heads, 2h-1, 2w-1) by key - query.

    Where the number of entries is no square it does not tell h from w: the table stays flat, (heads, entries).
    """
    table = table.flip(0).T.contiguous()
    side = round(table.shape[1] ** 0.5)
    return table.unflatten(1, (side, side)) if side * side == table.shape[1] else table


def to_swin_table(table: Tensor) -> Tensor:
    return table.flatten(1).T.flip(0).contiguous()
