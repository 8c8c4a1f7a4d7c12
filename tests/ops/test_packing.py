"""`ops.unpack` is `unbind`, whoever looks: its own derivative is for kernels alone."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import ops
from ops import packing
from ops.check.cases import packed
from ops.dispatch import unseen


@pytest.fixture(params=[False, True], ids=["operators", "kernels"])
def x(request, monkeypatch):
    """A packed map; in the second case its device is taken for one that has kernels."""
    if request.param:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return packed(1, 2, 3, 1, 4).requires_grad_()


def test_its_derivatives_are_those_of_unbind(x):
    assert type(ops.unpack(x)[0].grad_fn).__name__.startswith("Unpack") == unseen([x])
    assert gradcheck(ops.unpack, x, check_forward_ad=True) and gradgradcheck(ops.unpack, x)
    with forward_ad.dual_level():
        parts = ops.unpack(forward_ad.make_dual(x, x.detach().cos()))
        assert torch.equal(torch.stack([forward_ad.unpack_dual(p).tangent for p in parts], 3), x.cos())


def test_what_torch_func_makes_of_it(x):
    assert torch.equal(
        torch.func.grad(lambda t: ops.unpack(t)[1].sum())(x.detach())[:, :, :, 1], torch.ones(1, 2, 3, 1, 4)
    )
    parts = torch.vmap(ops.unpack)(x.detach()[None])
    assert all(torch.equal(got[0], want) for got, want in zip(parts, x.unbind(3), strict=True))
    (jacobian,) = torch.autograd.grad(ops.unpack(x)[2], x, torch.ones(5, 1, 2, 3, 1, 4), is_grads_batched=True)
    assert torch.equal(jacobian[4, :, :, :, 2], torch.ones(1, 2, 3, 1, 4)) and not jacobian[:, :, :, :, :2].any()


def test_tracers_see_unbind(x):
    for traced in (torch.jit.script(ops.unpack), torch.compile(ops.unpack, backend="eager", fullgraph=True)):
        assert all(torch.equal(got, want) for got, want in zip(traced(x), x.unbind(3), strict=True))

    class Model(torch.nn.Module):
        def forward(self, t):
            return ops.unpack(t)[1]

    exported = torch.export.export(Model(), (x.detach(),))
    assert next(n.target for n in exported.graph.nodes if n.op == "call_function") == torch.ops.aten.unbind.int


WHOLE = torch.arange(2 * 2 * 3 * 3 * 4 * 5.0).view(2, 2, 3, 3, 4, 5)
PARTS = {
    "in another order": lambda q, k, v: (k, q, v),
    "one twice": lambda q, k, v: (q, q, v),
    "of several maps": lambda q, k, v: (q, k, v.clone()),
    "every other": lambda q, k, v: (q, v),
    "channels turned": lambda q, k, v: tuple(t.transpose(3, 4) for t in (q, k, v)),
    "of two dtypes": lambda q, k, v: (q, k, v.view(torch.int32)),
    "contiguous": lambda q, k, v: tuple(t.contiguous() for t in (q, k, v)),
    "rows cut off": lambda q, k, v: tuple(t[:, 1:] for t in (q, k, v)),
}


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_what_is_no_packed_map(change):
    q, k, v = WHOLE.unbind(3)
    assert torch.equal(packing.whole_of([q, k, v]), WHOLE)
    assert packing.whole_of(change(q, k, v)) is None


@pytest.mark.parametrize("shape", [(), (2, 6, 8, 3), (2, 6, 8, 3, 2, 4, 1)])
def test_a_packed_map_has_six_axes(shape):
    with pytest.raises(ValueError, match=r"packed is .*: expected \(B, H, W, n, heads, D\)"):
        ops.unpack(torch.zeros(shape))


def test_gradients_are_laid_as_tensors_are():
    q, k, v = WHOLE.unbind(3)
    first, second = WHOLE[:, :, :, 1:].clone().unbind(3)
    for given, pitches in (((q, k, v), [12, 12, 12]), ((q, first, second), [4, 8, 8]), ((v, k, q), [4, 4, 4])):
        made, found = packing.as_given(*given)
        assert found == pitches and all(t.shape == q.shape for t in made)
        assert [t.stride(2) // t.stride(3) for t in made] == pitches
    made, found = packing.apart(q, k, v)
    assert found == [4, 4, 4] and all(t.is_contiguous() for t in made)
