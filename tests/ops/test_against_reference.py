"""One body for all ops, dtypes and shapes: an implementation may be twice as wrong as the reference in its dtype."""

import pytest
import torch
from torch.autograd import gradcheck

import ops
from ops.check.bound import ErrorBound, broken
from ops.check.cases import gradients, random
from ops.check.tables import BY_NAME, CASES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_the_references(case, dtype):
    found = ErrorBound(case, dtype).shares("torch")
    assert not broken(found), broken(found)


def test_a_key_that_a_row_has_many_times():
    """Its gradient adds what should cancel, in windows of so many tokens that fused attention would serve."""
    found = ErrorBound(BY_NAME["window_attention-davit_12"], torch.float32).shares("torch")
    assert not broken(found), broken(found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_references(case):
    inputs = case.make()
    for want, got in zip(gradients(case, inputs, "reference"), gradients(case, inputs, "torch"), strict=True):
        assert (got - want).abs().max() <= 1e-13 * max(want.abs().max(), 1)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_a_table_may_hide_keys_in_windows_that_do_not_divide_the_map(impl, partition):
    """Queries beyond the map may then have no key at all, of which no gradient hears."""
    q, k, v = (random(1, 9, 7, 1, 8, seed=seed).requires_grad_() for seed in range(3))
    hidden = random(1, 7, 7, seed=3) < 0
    hidden[:, 3, 3] = False  # the query's own position
    table = random(1, 7, 7, seed=4).masked_fill(hidden, float("-inf")).requires_grad_()
    out = ops.window_attention(q, k, v, table, 4, partition, impl=impl)
    *found, of_table = torch.autograd.grad(out.square().sum(), (q, k, v, table))
    assert all(t.isfinite().all() for t in (out, *found, of_table)) and (of_table[hidden] == 0).all()
    finite = table.detach().masked_fill(hidden, -1e9)
    expected = ops.window_attention(q, k, v, finite, 4, partition, impl="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, list(torch.autograd.grad(expected.square().sum(), (q, k, v))))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("H", "W", "dilation", "outside"), [(7, 7, 2, False), (17, 14, (1, 3), False), (17, 5, 2, True)]
)
def test_a_table_may_hide_neighbors_where_lines_and_tiles_have_other_lengths(impl, learned, H, W, dilation, outside):
    """Of queries that are cropped no gradient hears, whether the table leaves them a key or not."""
    q, k, v = (random(1, H, W, 1, 8, seed=seed).requires_grad_() for seed in range(3))
    beyond = (random(1, 8, seed=3), random(1, 8, seed=4)) if outside else None
    hidden = torch.zeros(1, 5, 5, dtype=torch.bool)
    hidden[:, :2] = True  # the row of the query is the first that it sees
    table = random(1, 5, 5, seed=5).masked_fill(hidden, float("-inf")).requires_grad_(learned)
    inputs = (q, k, v, table) if learned else (q, k, v)
    out = ops.neighborhood_attention(q, k, v, table, 3, dilation, outside=beyond, impl=impl)
    found = torch.autograd.grad(out.square().sum(), inputs)
    finite = table.detach().masked_fill(hidden, -1e9).requires_grad_(learned)
    inputs = (q, k, v, finite) if learned else (q, k, v)
    expected = ops.neighborhood_attention(q, k, v, finite, 3, dilation, outside=beyond, impl="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gradients(case):
    inputs = {name: t.float() for name, t in case.make().items()}
    with torch.no_grad():
        got, want = case.call(impl="torch", **inputs), case.call(impl="reference", **inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_without_data(case, impl):
    """On the meta device, where only shapes are computed; it has no autocast."""
    inputs = {name: t.to("meta") for name, t in case.make().items()}
    out, *found = gradients(case, inputs, impl)
    assert out.is_meta and [t.shape for t in found] == [t.shape for t in inputs.values()]


NONE = {
    "routed_attention": lambda x, impl: ops.routed_attention(x, x, x, (3, 2), 2, impl=impl),
    "super_tokens": lambda x, impl: ops.super_tokens(x[..., 0, :], (2, 4), 2, True, impl=impl)[0],
    "reallocate_tokens": lambda x, impl: ops.reallocate_tokens(
        x[..., 0, :], x[..., 0, 0], [torch.ones(1, 2, dtype=x.dtype)], [torch.zeros(1, dtype=x.dtype)], [1], impl=impl
    )[0],
}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("op", NONE)
def test_an_empty_batch(op, impl):
    x = random(0, 6, 8, 2, 4).requires_grad_()
    out = NONE[op](x, impl)
    out.sum().backward()
    assert out.shape[0] == 0 and x.grad.shape == x.shape


SMALL = {
    "window_attention-outside_grid",
    "window_attention-small_map",
    "neighborhood_attention-mixed",
    "neighborhood_attention-outside",
    "routed_attention-top1",
    "channel_attention-small",
    "pooled_attention-sequence",
    "super_tokens-differentiable",
    "reallocate_tokens-halves_odd",
}


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("case", [case for case in CASES if str(case) in SMALL], ids=str)
def test_gradcheck(case, impl):
    inputs = {name: t.requires_grad_() for name, t in case.make().items()}
    assert gradcheck(
        lambda *t: case.call(impl=impl, **dict(zip(inputs, t, strict=True))), tuple(inputs.values()), fast_mode=True
    )


MIXED = ("window_attention", "neighborhood_attention", "routed_attention")


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", [c for c in CASES if c.op in MIXED], ids=str)
def test_autocast(case, impl):
    """Under autocast the projection gives bfloat16 and the bias table stays float32."""
    inputs = {name: t.bfloat16() if name == "qkv" else t.float() for name, t in case.make().items()}
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    truth = case.call(impl="reference", **{name: t.detach().double() for name, t in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call(impl=impl, **inputs)
    out.sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.dtype == t.dtype for t in inputs.values())
    assert (out.double() - truth).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


@pytest.mark.parametrize("case", [c for c in CASES if c.op in ("routed_attention", "super_tokens")], ids=str)
def test_autocast_decides_the_dtype(case):
    """Where kernels and copies are all that runs, too: what is returned, and passed between two ops, is in it."""
    inputs = {name: t.float().requires_grad_() for name, t in case.make().items()}
    truth = case.call(impl="reference", **{name: t.detach().double() for name, t in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call(impl="torch", **inputs)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(t.grad.isfinite().all() and t.grad.dtype == torch.float32 for t in inputs.values())
    assert (out.double() - truth).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert case.call(impl="torch", **case.make()).dtype == torch.float64


@pytest.mark.parametrize(
    ("op", "given"),
    [
        (ops.window_attention, {"bias": None, "window": 4}),
        (ops.neighborhood_attention, {"bias": None, "window": 3}),
        (ops.neighborhood_attention, {"bias": None, "window": 3, "dilation": 2}),
        (ops.routed_attention, {"regions": 4, "topk": 2}),
        (ops.channel_attention, {}),
    ],
)
@pytest.mark.parametrize("wide", [0, 1, 2])
def test_autocast_makes_one_dtype_of_several(op, given, wide):
    """One of queries, keys and values is float32, the others are bfloat16."""
    x = [random(2, 8, 8, 2, 16).to(torch.float32 if i == wide else torch.bfloat16) for i in range(3)]
    truth = op(*(t.double() for t in x), **given, impl="reference")
    x = [t.requires_grad_() for t in x]
    with torch.autocast("cpu", torch.bfloat16):
        out = op(*x, **given, impl="torch")
    out.sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.dtype == t.dtype for t in x)
    assert (out.double() - truth).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_over_tokens_are_no_halves_under_autocast(dtype):
    """Of 90,000 tokens, they are beyond half precision."""
    q, k, v = (random(1, 300, 300, 1, 4).to(dtype) + 1 for _ in range(3))
    truth = ops.channel_attention(q.double(), k.double(), v.double(), 1e-4, impl="reference")
    with torch.autocast("cpu", torch.float16):
        out = ops.channel_attention(q, k, v, 1e-4, impl="torch")
    assert (out.double() - truth).abs().max() <= 4 * torch.finfo(torch.float16).eps * truth.abs().max()


def test_super_tokens_under_autocast_are_in_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        tokens, affinity = ops.super_tokens(random(1, 8, 8, 6).float(), 4)
    assert tokens.dtype == affinity.dtype == torch.bfloat16


def test_a_backward_inside_autocast():
    x = [torch.randn(2, 6, 8, 2, 4, requires_grad=True) for _ in range(3)]
    out = ops.routed_attention(*x, (3, 2), 2, impl="torch")
    probe = torch.randn_like(out)
    want = torch.autograd.grad(out, x, probe, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out, x, probe)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
