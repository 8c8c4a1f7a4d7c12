"""Channel attention: the channels of a head attend to each other, over all tokens of the map."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_maps, factor
from ..dispatch import choose
from . import reference
from .torch_path import attend as torch_attend


def channel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Attention between channels: k and v form a D x D attention matrix that mixes the channels of q.

        A[i, j] = softmax_j(scale * sum_t k[t, i] v[t, j]),   out[t, i] = sum_j A[i, j] q[t, j]

    The sum over the tokens t is not divided by their number: the softmax sharpens as the map grows.

    q, k, v    (B, H, W, heads, D), any strides
    scale      factor on the logits; None: D ** -0.5
    returns    (B, H, W, heads, D)

    Raises ValueError for invalid shapes and dtypes, and what `ops.dispatch.choose` raises for `impl`.
    Source: DaViT, https://arxiv.org/abs/2204.03645, section 3.2.
    """
    check_maps(q, k, v)
    scale_ = factor(scale, q.shape[-1])
    if torch.jit.is_scripting():
        return torch_attend(q, k, v, scale_)
    else:
        attend = {"triton": _triton_attend, "torch": torch_attend, "reference": reference.attend}
        return attend[choose(impl, q, op="channel_attention")](q, k, v, scale_)


def _triton_attend(*args: Any) -> Tensor:
    from .triton_path import attend  # triton is only imported where it runs

    return attend(*args)
