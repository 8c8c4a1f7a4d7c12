"""Attention weights from recorded calls.

Every attention op is linear in its values (channel attention in its queries), so the weight that a query gives to a key
is a derivative: of the query's output with respect to that key's value. It is correct for any partition, dilation,
border and bias, since the op itself is differentiated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import Call

Token = tuple[int, int]


def weights(call: Call, query: Token | Sequence[Token]) -> Tensor:
    """(heads, h, w): how much a query attends to each position of the values' map, for the first image of a batch.

    query  (row, column) on the map of the result; for several, whose keys must differ, the sum of their weights
    The weights of a head sum to 1, or to less if positions outside the map are attended too.
    """
    queries = [query] if isinstance(query[0], int) else query
    v = _leaf(call.arguments["v"])
    with torch.enable_grad():
        out = call.again(v=v)  # (B, H, W, heads, D)
        total = sum(out[0, y, x, :, 0].sum() for y, x in queries)
    (grad,) = torch.autograd.grad(total, v)
    return grad[0, ..., 0].movedim(-1, 0)


def reach(call: Call, query: Token | Sequence[Token]) -> Tensor:
    """(h, w) bool: the positions that a query attends to at all."""
    neutral = {"q": torch.zeros_like(call.arguments["q"])}
    if call.arguments.get("bias") is not None:
        neutral["bias"] = torch.zeros_like(call.arguments["bias"])
    return weights(call.with_arguments(**neutral), query)[0] > 0


def channel_weights(call: Call) -> Tensor:
    """(heads, D, D): how much each channel of a head attends to each, row by row, in a call of channel attention."""
    q = _leaf(call.arguments["q"])
    with torch.enable_grad():
        token = call.again(q=q)[0, 0, 0]  # (heads, D)
    rows = [torch.autograd.grad(token[:, i].sum(), q, retain_graph=True)[0][0, 0, 0] for i in range(token.shape[1])]
    return torch.stack(rows, 1)


def merged(call: Call) -> tuple[Tensor, Tensor]:
    """For each token of the map, (H, W), in a call of token reallocation: the number of the run that it is merged into,
    in the order of rows, and how many tokens that run holds.
    """
    # in float32: half precision does not tell large numbers apart
    x = torch.zeros_like(call.arguments["x"][:1, ..., :1], dtype=torch.float32).requires_grad_()  # (1, H, W, 1)
    given = {"order": call.arguments["order"][:1]}
    given["biases"] = [torch.zeros_like(b, dtype=torch.float32) for b in call.arguments["biases"]]
    given["weights"] = [torch.ones_like(w, dtype=torch.float32) for w in call.arguments["weights"]]
    with torch.enable_grad():
        runs = call.again(x=x, **given)[0][0, :, 0]  # a run is the sum of its tokens
    counts = call.again(x=torch.ones_like(x), **given)[0][0, :, 0].detach()
    numbers = torch.arange(len(runs), dtype=runs.dtype, device=runs.device)
    number, size = (torch.autograd.grad(runs @ of, x, retain_graph=True)[0][0, ..., 0] for of in (numbers, counts))
    return number.round().long(), size.round().long()


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
