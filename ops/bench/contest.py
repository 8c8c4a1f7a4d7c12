"""What `ops.bench` times: one call of an op, as its peers would make it, on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

COMPILED = ("torch compiled", "flex")  # peers that a compiler makes for each call anew, which takes seconds

Tensors = dict[str, Tensor]
Result = Tensor | tuple[Tensor, ...]


def as_given(**inputs: Tensor) -> Tensors:
    return inputs


@dataclass(frozen=True)
class Peer:
    """A way to compute the op.

    run      (**inputs) -> the result, or a tuple that begins with the results
    arrange  what makes of the op's inputs those of `run`; it is not timed. A peer that cuts its map before the
             projection has q, k and v in windows from the start; what is timed is one copy of a map into windows, and
             one back
    plain    whether it leaves out the bias: it is then held to the op without one
    """

    run: Callable[..., Result]
    arrange: Callable[..., Tensors] = as_given
    plain: bool = False


@dataclass(frozen=True)
class Contest:
    """The inputs of a call by name, which all have gradients unless `learned` is false; the op; its peers by name.

    op       (**inputs, impl=...) -> the result, or a tuple of `results` of them
    kernel   whether the op has a kernel of its own besides its `torch` path
    """

    inputs: Tensors
    op: Callable[..., Result]
    peers: dict[str, Peer] = field(default_factory=dict)
    results: int = 1
    learned: bool = True
    kernel: bool = True

    def all_peers(self, device: str) -> dict[str, Peer]:
        """`ours`, what `auto` takes on this device, then the path in ordinary operators, then those of others."""
        found = {"ours": Peer(self.op)}
        if device == "cuda" and self.kernel:
            found["torch"] = Peer(partial(self.op, impl="torch"))
        found["torch compiled"] = Peer(compiled(partial(self.op, impl="torch")))
        return found | self.peers


def compiled(function: Callable) -> Callable:
    """The function compiled for the shapes of its first call, when that comes."""
    return torch.compile(function, dynamic=False)


class Projected(nn.Module):
    """In the place of a projection: what it is to return is given to it beforehand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.given


def heads_first(x: Tensor) -> Tensor:
    """(B, ..., heads, D) -> (B, heads, tokens, D), a view where it can be."""
    return x.flatten(1, -3).transpose(1, 2)


def flex_attention(**options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention of (B, heads, N, D) with these options, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return partial(compiled(flex_attention), **options)


def products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention as two products with a softmax between them, of (..., N, D)."""
    logits = q * scale @ k.transpose(-1, -2)
    return (logits if mask is None else logits + mask).softmax(-1) @ v
