"""The torch path of routed attention: how it is cut into blocks changes nothing but the memory that it takes."""

import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import ops
from ops.bench.measure import held
from ops.check.cases import packed, random, routed_case

path = importlib.import_module("ops.routed_attention.torch_path")
CASE = routed_case("blocks", 12, 15, (3, 5), 4)
PAIR = 2 * 4 * 12 * (2 * 8 + 12) * 8  # bytes of one region of one image: heads, topk, pixels of a region, D, float64


@pytest.fixture
def route():
    return ops.route_regions(*packed(2, 12, 15, 2, 8).unbind(3)[:2], (3, 5), 4)


@pytest.mark.parametrize(("fit", "count"), [(1, 30), (3, 12), (5, 6), (11, 4), (15, 2), (29, 2), (30, 1)])
def test_blocks(fit, count, route, monkeypatch):
    """Parts of a row of regions, rows, images: each block has as many regions as fit."""
    monkeypatch.setattr(path, "CACHED", fit * PAIR)
    inputs = CASE.make()
    groups = path.blocks(inputs["qkv"].select(3, 0), (3, 5), route)
    assert sum(len(rows) * len(cols) for _, rows, cols in groups) == count
    qkv = inputs["qkv"].requires_grad_()
    probe = random(2, 12, 15, 2, 8)
    results = []
    for impl in ("torch", "reference"):
        out = CASE.call(qkv, impl)
        results.append([out, *torch.autograd.grad(out, qkv, probe)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_keys_are_gathered_at_once(dtype, learned, route, monkeypatch):
    """Except for gradients in half precision, which PyTorch's fused attention takes long for."""
    monkeypatch.setattr(path, "Gathered", None)
    qkv = packed(2, 12, 15, 2, 8).to(dtype).requires_grad_(learned)
    fits = 30 * PAIR // 8 * dtype.itemsize
    monkeypatch.setattr(path, "CACHED", fits)
    gathers = "'NoneType' object has no attribute 'apply'"
    if learned and dtype == torch.bfloat16:
        with pytest.raises(AttributeError, match=gathers):
            Routed()(qkv, route)
    else:
        Routed()(qkv, route)
    monkeypatch.setattr(path, "CACHED", fits - 1)
    with pytest.raises(AttributeError, match=gathers):
        Routed()(qkv, route)


class Routed(nn.Module):
    def forward(self, qkv, route):
        return ops.routed_attention(*qkv.unbind(3), regions=(3, 5), topk=4, route=route)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_blocks_of_a_graph(rows, route, monkeypatch):
    """They are ordinary operators, rows of regions of all images at a time."""
    monkeypatch.setattr(path, "fitting", lambda size, budget=None: rows)
    monkeypatch.setattr(path, "FEW", 0)  # one operator a block: they can be counted
    batch = {0: torch.export.Dim("batch")}
    inputs = (packed(2, 12, 15, 2, 8), route)
    program = torch.export.export(Routed(), inputs, dynamic_shapes=(batch, batch))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("scaled_dot_product" in name for name in names) == -(-3 // rows)
    more = [torch.cat([t, t.flip(0)[:1]]) for t in inputs]
    torch.testing.assert_close(program.module()(*more), Routed()(*more), rtol=0, atol=1e-13)
    torch.compiler.reset()
    compiled = torch.compile(Routed(), fullgraph=True, backend="aot_eager")
    gradients = []
    for model in (compiled, Routed()):
        qkv = inputs[0].clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(qkv, route).sin().sum(), qkv))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_second_derivative_of_blocks(route, monkeypatch):
    monkeypatch.setattr(path, "CACHED", 1)
    qkv = packed(2, 6, 10, 1, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: Routed()(t, route), (qkv,), fast_mode=True)


def test_memory_grows_with_the_map_alone():
    """Forward and backward hold less than one copy of the keys for each of the regions that they are chosen by."""
    qkv, topk = torch.randn(8, 56, 56, 3, 2, 16), 16
    route = ops.route_regions(*qkv.unbind(3)[:2], (7, 7), topk)

    def run(impl):
        x = qkv.detach().requires_grad_()
        out = ops.routed_attention(*x.unbind(3), (7, 7), topk, route, impl=impl)
        return torch.autograd.grad(out.sum(), x)

    copies = topk * qkv[:, :, :, 0].numel() * 4 / 2**20
    assert held(lambda: run("torch")) < copies < held(lambda: run("reference"))


def test_batched_gradients_are_refused_where_a_backward_gathers_again(monkeypatch):
    """The vmap of torch.autograd lacks views that it takes; torch.func's decides what runs forward."""
    monkeypatch.setattr(path, "CACHED", 1)
    q, k, v = CASE.make()["qkv"].unbind(3)

    def total(q, impl="auto"):
        return ops.routed_attention(q, k, v, (3, 5), 4, impl=impl).sum((0, 1, 2, 3))

    with pytest.raises(RuntimeError, match=r"no batched gradients .*: use impl='reference', or torch.func.jacrev"):
        jacobian(total, q, vectorize=True)
    want = jacobian(total, q)
    torch.testing.assert_close(jacobian(partial(total, impl="reference"), q, vectorize=True), want)
    torch.testing.assert_close(torch.func.jacrev(total)(q), want)
