"""What `ops.bench` times: one call of an op and the same computation by its peers, on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

COMPILED = ("torch compiled", "flex")  # peers that are compiled anew for each call, which takes seconds

Tensors = dict[str, Tensor]
Result = Tensor | tuple[Tensor, ...]


def as_given(**inputs: Tensor) -> Tensors:
    return inputs


@dataclass(frozen=True)
class Peer:
    """A way to compute the op.

    run           (**inputs) -> the result, or a tuple that begins with the results
    arrange       turns the op's inputs into those of `run`; it is not timed. A peer that partitions its map before the
                  projection has q, k and v in windows from the start; only one copy of a map into windows and one back
                  are timed
    without_bias  whether it leaves out the bias; it is then compared with the op without one
    """

    run: Callable[..., Result]
    arrange: Callable[..., Tensors] = as_given
    without_bias: bool = False


@dataclass(frozen=True)
class Contest:
    """The inputs of a call by name, the op, and its peers by name. All inputs have gradients unless `learned` is false.

    op       (**inputs, impl=...) -> the result, or a tuple of `results` of them
    kernel   whether the op has a kernel besides its `torch` path
    """

    inputs: Tensors
    op: Callable[..., Result]
    peers: dict[str, Peer] = field(default_factory=dict)
    results: int = 1
    learned: bool = True
    kernel: bool = True

    def all_peers(self, device: str) -> dict[str, Peer]:
        """`ours`, which is what `auto` selects on this device, then the PyTorch path, then the other peers."""
        found = {"ours": Peer(self.op)}
        if device == "cuda" and self.kernel:
            found["torch"] = Peer(partial(self.op, impl="torch"))
        found["torch compiled"] = Peer(compiled(partial(self.op, impl="torch")))
        return found | self.peers


def compiled(function: Callable) -> Callable:
    """The function, compiled on its first call for the shapes of that call."""
    return torch.compile(function, dynamic=False)


class Projected(nn.Module):
    """Replaces a projection: returns what was assigned to `given` beforehand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.given


def heads_first(x: Tensor) -> Tensor:
    """(B, ..., heads, D) -> (B, heads, tokens, D), a view where it can be."""
    return x.flatten(1, -3).transpose(1, 2)


def flex_attention(**options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention of (B, heads, N, D) with these options."""
    from torch.nn.attention.flex_attention import flex_attention

    return partial(compiled(flex_attention), **options)


def products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention of (..., N, D) as two matmuls with a softmax between them."""
    logits = q * scale @ k.transpose(-1, -2)
    return (logits if mask is None else logits + mask).softmax(-1) @ v
