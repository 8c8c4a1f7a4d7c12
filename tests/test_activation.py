"""GELU by a sigmoid is torch's GELU by a tanh, in values and in derivatives of any order."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.profiler import profile

import ops
from zoo.blocks import GELUTanh, activation

gelu = GELUTanh()


@pytest.fixture(autouse=True)
def of_few_values(monkeypatch):
    """As of many, in several parts."""
    monkeypatch.setattr(activation, "FEW", 0)
    monkeypatch.setattr(activation, "CACHED", 50)


def by_torch(x):
    return F.gelu(x, approximate="tanh")


def operators(x):
    """What runs for a call."""
    with profile() as seen:
        gelu(x)
    return {event.key for event in seen.key_averages()}


def values(*shape):
    """A (*shape) map with values where GELU bends and where it is flat or straight."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize(
    "x",
    [values(2, 5, 7, 3), values(2, 3, 5, 7).to(memory_format=torch.channels_last), values(9, 8)[2:], values(1)],
    ids=["dense", "channels_last", "rest", "one"],
)
def test_values_and_gradients(x):
    x = x.detach().requires_grad_()
    exact, grad = x.detach().double().requires_grad_(), torch.linspace(-2, 2, x.numel()).view(x.shape)
    ours, theirs = gelu(x), by_torch(exact)
    assert ours.stride() == by_torch(x).stride()
    assert "aten::sigmoid_" in operators(x)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    found, expected = torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, exact, grad.double())
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_far_from_zero():
    x = torch.tensor([-torch.inf, -1e30, -1e4, -20.0, 0.0, 20.0, 1e4, 1e30, torch.inf, torch.nan])
    torch.testing.assert_close(gelu(x), by_torch(x), equal_nan=True, rtol=0, atol=1e-37)


def test_second_derivative():
    x = values(2, 6).requires_grad_()
    found, expected = (
        torch.autograd.grad(torch.autograd.grad(call(x).sum(), x, create_graph=True)[0].pow(2).sum(), x)[0]
        for call in (gelu, by_torch)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("x", [values(0, 4), torch.tensor(1.5), values(9, 8)[:, 1:]], ids=["empty", "scalar", "gaps"])
def test_values_that_do_not_fill_a_piece_of_memory(x):
    torch.testing.assert_close(gelu(x), by_torch(x))
    assert gelu(x).stride() == by_torch(x).stride()


def test_few_values_are_torch_s(monkeypatch):
    monkeypatch.setattr(activation, "FEW", 12)
    assert torch.equal(gelu(values(3, 4)), by_torch(values(3, 4)))
    assert "aten::gelu" in operators(values(3, 4)) and "aten::gelu" not in operators(values(13))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torch_s(dtype):
    x = values(3, 4).to(dtype)
    assert torch.equal(gelu(x), by_torch(x))


def test_the_reference_is_torch_s():
    x = values(3, 4)
    with ops.implementation("reference"):
        assert torch.equal(gelu(x), by_torch(x))
        assert "aten::gelu" in operators(x)


def test_an_input_changed_before_its_backward_is_an_error():
    x = values(3, 4).requires_grad_()
    changed = x * 1
    loss = gelu(changed).sum()
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_transforms_and_graphs_are_torch_s():
    x = values(3, 4)
    torch.testing.assert_close(torch.func.vmap(gelu)(x), by_torch(x))
    derivative = torch.func.jvp(gelu, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(derivative, torch.func.grad(lambda x: by_torch(x).sum())(x))
    assert "gelu" in str(torch.jit.script(gelu).inlined_graph)
    assert "aten::gelu" in str(torch.jit.trace(gelu, x).inlined_graph)
    program = torch.export.export(gelu, (x,))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.gelu.default"]
    traced = fx.symbolic_trace(gelu)
    torch.testing.assert_close(traced(x), by_torch(x))
