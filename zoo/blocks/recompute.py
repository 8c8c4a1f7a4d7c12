"""Gradient checkpointing: blocks are computed again in the backward pass, instead of keeping all that is inside them.

T. Chen et al. 2016, Training deep nets with sublinear memory cost, https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`, of which only the inputs are kept for the backward pass.

    Dropout and drop path draw the same values again. Batch norms update their running statistics in the first pass
    alone, so that a model learns exactly as without.
    """
    if torch.compiler.is_compiling():  # what a graph computes again changes no buffers
        return checkpoint(block, *inputs, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _with_statistics_kept(block)

    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _with_statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let norms of `block` in training mode record statistics in copies of their buffers, which are then dropped."""
    kind = nn.modules.batchnorm._NormBase  # of batch norms, synchronised or not, timm's as well
    norms = [norm for norm in block.modules() if isinstance(norm, kind) and norm.training]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
