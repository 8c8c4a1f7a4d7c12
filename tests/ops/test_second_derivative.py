"""Second derivatives of the torch paths: PyTorch's fused attention has none, and says so in our words."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import ops
from ops.check.cases import packed

FUSED = {
    "window": lambda q, k, v, impl: ops.window_attention(q, k, v, None, window=9, impl=impl),
    "padded windows": lambda q, k, v, impl: ops.window_attention(q, k, v, None, window=(13, 7), impl=impl),
    "neighborhood": lambda q, k, v, impl: ops.neighborhood_attention(q, k, v, None, 7, impl=impl),
    "routed": lambda q, k, v, impl: ops.routed_attention(q, k, v, 3, 4, impl=impl),
    "routed to all": lambda q, k, v, impl: ops.routed_attention(q, k, v, 3, 9, impl=impl),
    "routed to one": lambda q, k, v, impl: ops.routed_attention(q, k, v, 1, 1, impl=impl),
    "pooled": lambda q, k, v, impl: ops.pooled_attention(q, k, v, impl=impl),
}


def penalty(call, q, k, v, impl):
    """The gradient of the square of a gradient."""
    q = q.detach().requires_grad_()
    (grad,) = torch.autograd.grad(call(q, k, v, impl).sin().sum(), q, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), q)[0]


@pytest.mark.parametrize("call", FUSED.values(), ids=FUSED)
def test_fused_attention_refuses(call):
    q, k, v = packed(2, 9, 9, 2, 4).unbind(3)
    with pytest.raises(RuntimeError, match=r"no second derivative: use impl='reference' for it, or ops.implementation"):
        penalty(call, q, k, v, "torch")
    assert penalty(call, q, k, v, "reference").isfinite().all()


@pytest.mark.parametrize("name", ["window", "routed", "pooled"])
def test_matmuls_in_its_place_do_not(name):
    q, k, v = packed(2, 9, 9, 2, 4).unbind(3)
    with sdpa_kernel(SDPBackend.MATH):
        got = penalty(FUSED[name], q, k, v, "torch")
    torch.testing.assert_close(got, penalty(FUSED[name], q, k, v, "reference"), rtol=0, atol=1e-12)


def test_first_derivatives_of_transforms_are_not_refused():
    q, k, v = packed(2, 9, 9, 2, 4).unbind(3)

    def total(q, impl):
        return FUSED["pooled"](q, k, v, impl).sin().sum()

    got, want = (torch.func.grad(total)(q, impl) for impl in ("torch", "reference"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
