"""Activations."""

import math

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops.dispatch import by_reference, watched

# GELU's approximation is x sigmoid(LINEAR x + CUBIC x^3)
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
FEW = 2**16  # values of which one operator takes no longer than several
CACHED = 2**18  # values at a time that a CPU's cache holds


class GELUTanh(nn.GELU):
    """GELU, approximated with a tanh (Hendrycks and Gimpel, 1606.08415).

    For float32 tensors on a CPU it is computed with a sigmoid, which is a tanh of half the argument: torch takes much
    longer for a tanh.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(x)


@fx.wrap
@register_notrace_function
def gelu_tanh(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")`, as `GELUTanh` describes."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if _suits(x):
            return GELUTanhBySigmoid.apply(x)
    return F.gelu(x, approximate="tanh")


class GELUTanhBySigmoid(torch.autograd.Function):
    """As many values at a time as the cache holds; the gradient is torch's own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out, linear = torch.empty_like(x), x.new_tensor(LINEAR)
        for part, of_part in zip(_in_memory(x).split(CACHED), _in_memory(out).split(CACHED), strict=True):
            torch.addcmul(linear, part, part, value=CUBIC, out=of_part).mul_(part).sigmoid_().mul_(part)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, *ctx.saved_tensors, approximate="tanh")


def _suits(x: Tensor) -> bool:
    """Whether the sigmoid is faster, and nothing but autograd wants to see which operators run."""
    if not x.is_cpu or x.dtype != torch.float32 or watched(x) or by_reference() or x.numel() <= FEW:
        return False
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _in_memory(x: Tensor) -> Tensor:
    """The values of a tensor without gaps, in the order of its memory, as a view."""
    return x.as_strided((x.numel(),), (1,))
