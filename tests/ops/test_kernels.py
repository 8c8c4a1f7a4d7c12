"""The Triton kernels: on a GPU where there is one, else under Triton's interpreter (test_interpreter.py)."""

import importlib

import numpy as np
import pytest
import torch
from devices import DEVICE, INTERPRETED, needs_kernels
from neighborhood_record import RECORD, answers, case_id
from torch.nn import functional as F

import ops
from golden import unpack
from ops.check import machine
from ops.check.bound import ErrorBound, broken, share
from ops.check.cases import Case, neighborhood_case, packed, random, reallocate_case, window_case
from ops.check.tables import BY_NAME, EXTREME, RELEASED, with_kernels

pytestmark = needs_kernels

# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
SUITE = [case for case in BY_NAME.values() if with_kernels(case)]
FIRST = list({case.op: case for case in reversed(SUITE)}.values())
# interpreted, what no released model uses, or much like another case, is run in one precision
PAIRS = [
    (case, dtype) for case in SUITE for dtype in DTYPES if DEVICE == "cuda" or dtype.itemsize == 4 or case in RELEASED
]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=[f"{case}-{str(dtype)[6:]}" for case, dtype in PAIRS])
def test_error_is_at_most_twice_the_references(case, dtype):
    found = ErrorBound(case, dtype, DEVICE).shares("triton")
    assert not broken(found), broken(found)


def rounded(x):
    """float32 to the 10 bits after the point that TF32 has, to the nearest."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def three_products(self, a, b, sums, *_):
    """What `tl.dot` gives with "tf32x3", of which the interpreter knows nothing."""
    large, small = zip(*((rounded(x), rounded(x - rounded(x))) for x in (a.data, b.data)), strict=True)
    made = small[0] @ large[1] + large[0] @ small[1] + large[0] @ large[1]
    return type(sums)(made + sums.data, sums.dtype.scalar)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies itself: python -m ops.check --float32 tf32x3")
@pytest.mark.parametrize("case", [*FIRST, *EXTREME], ids=str)
def test_error_with_three_products_in_tf32(case, monkeypatch):
    """Products have 22 bits instead of 24, which is seen where logits are large."""
    monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_dot", three_products)
    found = ErrorBound(case, torch.float32, DEVICE).shares("triton")
    assert max(found.values()) <= (1.5 if case in EXTREME else 1), found


def unpacked(case):
    """The case with q, k and v as three inputs: the largest of their gradients must not hide the error of another."""

    def make():
        made = case.make()
        return dict(zip("qkv", made.pop("qkv").unbind(3), strict=True)) | made

    def call(q, k, v, **rest):
        return case.call(torch.stack([q, k, v], 3), **rest)

    return Case(case.op, case.name, make, call)


def in_order(self, a, b, sums, *_):
    """`tl.dot` as a GPU sums float32: by channel, wherever in a tile a logit is."""
    made = sums.data.copy()
    for left, right in zip(a.data.T, b.data, strict=True):
        made += np.outer(left, right)
    return type(sums)(made, sums.dtype.scalar)


# a row's error depends on how near its largest logits are: fewer images would be too few to compare two errors
SHARP = [
    window_case("tiles", 9, 11, (12, 12), D=32, heads=1, B=4, outside=True, sharp=40),
    neighborhood_case("tiles", 4, 12, (5, 7), 1, D=24, heads=1, B=4, outside=True, sharp=40),
]


@pytest.mark.parametrize("case", SHARP, ids="{}-float32".format)
def test_each_gradient_of_several_tiles_where_logits_are_large(case, monkeypatch):
    """Probabilities of one row are computed by several kernels: the inverse of their sum passes from one to others.

    It holds if all of them find the same logits. NumPy's products can depend on where in a tile a logit is.
    """
    if INTERPRETED:
        monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_dot", in_order)
    found = ErrorBound(unpacked(case), torch.float32, DEVICE).shares("triton")
    assert not broken(found), broken(found)


@pytest.mark.parametrize("case", SHARP, ids="{}-float32".format)
def test_each_row_of_probabilities_sums_to_one_in_the_gradients_of_values(case, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_dot", in_order)
    given = {name: x.to(DEVICE, torch.float32).requires_grad_() for name, x in unpacked(case).make().items()}
    out = unpacked(case).call(**given, impl="triton")
    grad, D = torch.zeros_like(out), out.shape[-1]
    grad[0].flatten(0, 2)[:D].fill_diagonal_(1)  # as many queries as there are channels, each in a channel of its own
    dv, dv0 = torch.autograd.grad(out, (given["v"], given["v0"]), grad)
    torch.testing.assert_close(dv[0].sum((0, 1)) + dv0, torch.ones_like(dv0), rtol=0, atol=1e-6)


OUTSIDE = [
    window_case("mostly", 1, 1, (14, 14), D=32, heads=1, bias=False, outside=True, sharp=0.1),
    neighborhood_case("mostly", 1, 12, (17, 1), 1, D=32, heads=1, outside=True, sharp=0.1),
]


@pytest.mark.parametrize("case", OUTSIDE, ids="{}-float32".format)
def test_each_gradient_where_most_keys_are_outside(case):
    """They are the same key, and what it adds to a query's gradient cancels with little remaining."""
    found = ErrorBound(unpacked(case), torch.float32, DEVICE).shares("triton")
    assert not broken(found), broken(found)


@pytest.mark.parametrize(
    ("size", "scale", "factors"), [(1e-5, 32**-0.5, (1, 1, 1)), (3e3, 10.0, (10, 0.01, 0.01))], ids=["small", "large"]
)
def test_gradients_of_channel_logits_fit_into_float16(size, scale, factors):
    """As sums over all tokens times scale, they can be subnormal, or infinite, where the results are neither."""
    given = [(factor * random(1, 14, 14, 1, 32, seed=i)).to(DEVICE, torch.float16) for i, factor in enumerate(factors)]
    probe = (size * random(1, 14, 14, 1, 32, seed=7)).to(DEVICE, torch.float16)

    def gradients(impl, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in given]
        return torch.autograd.grad(ops.channel_attention(*inputs, scale, impl=impl), inputs, probe.to(dtype))

    for got, want in zip(gradients("triton", torch.float16), gradients("reference", torch.float64), strict=True):
        assert (got.double() - want).abs().max() <= 2 * torch.finfo(torch.float16).eps * want.abs().max()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_gradient_where_logits_are_large(seed):
    """The base-2 logarithm of a row's sum has few digits after the point: the row must not sum to 1 only by it."""
    q, k, v = (random(1, 7, 7, 1, 32, seed=10 * seed + i) for i in range(3))

    def call(q, k, v, bias, impl):
        return ops.window_attention(q, k, v, bias, 7, impl=impl)

    case = Case("window_attention", "sharp", lambda: {"q": 40 * q, "k": k, "v": v, "bias": random(1, 13, 13)}, call)
    found = ErrorBound(case, torch.float32, DEVICE).shares("triton")
    assert not broken(found), broken(found)


@pytest.mark.parametrize("case", RECORD["cases"], ids=case_id)
def test_neighborhood_attention_recorded(case):
    eager, got = (answers(case, impl, torch.float32, DEVICE) for impl in ("reference", "triton"))
    found = {name: share(unpack(case[name]).to(DEVICE), eager[name], got[name]) for name in got}
    assert not broken(found), broken(found)


def nearest(size, window, dilation):
    """(size, size): whether position j is one of the `window` nearest to i among those that are whole steps away."""
    near = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        steps = [j for j in range(size) if (j - i) % dilation == 0]
        near[i, sorted(steps, key=lambda j: abs(j - i))[:window]] = True
    return near


@pytest.mark.parametrize(
    ("H", "W", "window", "dilation"),
    [
        (9, 12, (7, 7), (1, 1)),
        (8, 7, (3, 3), (2, 2)),
        (10, 12, (3, 3), (3, 3)),
        (10, 12, (5, 3), (2, 1)),
        (7, 9, (7, 3), (1, 3)),
    ],
)
def test_neighborhood_attention_is_full_attention_with_a_mask(H, W, window, dilation):
    """The last of these covers the map."""
    q, k, v = packed(2, H, W, 2, 8).to(DEVICE, torch.float32).unbind(3)
    bias = random(2, 2 * window[0] - 1, 2 * window[1] - 1).to(DEVICE, torch.float32)
    rows, columns = (nearest(*axis) for axis in zip((H, W), window, dilation, strict=True))
    near = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1).to(DEVICE)
    y, x = torch.arange(H * W, device=DEVICE) // W, torch.arange(H * W, device=DEVICE) % W
    entries = [(t - t[:, None]) // d + w - 1 for t, d, w in zip((y, x), dilation, window, strict=True)]
    mask = bias[:, entries[0].where(near, 0), entries[1].where(near, 0)].masked_fill(~near, float("-inf"))
    want = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)), mask, scale=0.7)
    out = ops.neighborhood_attention(q, k, v, bias, window, dilation, 0.7, impl="triton")
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), want)


@pytest.mark.parametrize("programs", [1, 60, 10**6])
@pytest.mark.parametrize("size", [(13, 11), (2, 1)], ids=str)
def test_runs_are_summed_in_any_number_of_sections(size, programs, monkeypatch):
    """Of one, some and each of the tiles of a group's runs; on the small map groups are empty."""
    monkeypatch.setattr(importlib.import_module("ops.token_reallocation.triton_path"), "PROGRAMS", programs)
    case = reallocate_case("sections", *size, [17, 4, 3, 1], [1, 3, 1, 2])
    found = ErrorBound(case, torch.float32, DEVICE).shares("triton")
    assert not broken(found), broken(found)


@pytest.mark.parametrize("shares_of", [[2**26 + 1, 2**26], [2**30, 2**30]], ids=["odd", "halves"])
def test_shares_may_be_large(shares_of):
    """Numbers of tokens, say: times the size of a map they need 64 bits, or a common divisor."""
    found = ErrorBound(reallocate_case("large", 5, 8, [4, 3], shares_of), torch.float32, DEVICE).shares("triton")
    assert not broken(found), broken(found)


def test_an_order_in_32_bits():
    x, order = random(1, 5, 8, 4).to(DEVICE, torch.float32), torch.arange(40, device=DEVICE).flip(0).expand(1, 2, -1)
    weights, biases = [random(1, n).to(x) for n in (4, 3)], [random(1).to(x)] * 2

    def gradient(order):
        leaf = x.clone().requires_grad_()
        merged = ops.reallocate_tokens(leaf, None, weights, biases, [1, 1], order, impl="triton")
        return torch.autograd.grad(torch.cat(merged).square().sum(), leaf)[0]

    assert torch.equal(gradient(order.int()), gradient(order))


@pytest.mark.parametrize("name", ["maxvit_7_grid", "gcvit_7", "whole_12", "whole_14", "whole_14_shared"])
@pytest.mark.parametrize("most", [1, 12])
def test_a_program_takes_several_windows(name, most, monkeypatch):
    """All windows of a head, or some and a rest: for these a table is looked up once, and gradients are summed."""
    path = importlib.import_module("ops.window_attention.triton_path")
    monkeypatch.setattr(path, "PROGRAMS", dict.fromkeys(path.PROGRAMS, most))
    found = ErrorBound(BY_NAME[f"window_attention-{name}"], torch.float16, DEVICE).shares("triton")
    assert not broken(found), broken(found)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter has one order only")
@pytest.mark.parametrize("case", SUITE, ids=str)
def test_same_bits_twice(case):
    machine.same_bits(case, DEVICE)


# interpreted one shows the way, and test_operators.py traces them all
@pytest.mark.parametrize("case", FIRST if DEVICE == "cuda" else [c for c in FIRST if c.op == "significance"], ids=str)
def test_compiled_as_one_graph(case):
    machine.compiled(case, DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_captured_in_a_graph(case):
    machine.captured(case, DEVICE)


# tokens up to which one program sorts, and pairs of tokens up to which places are counted; beyond, torch sorts
RANKING = [
    ("sort_kernel", 256, 0, [(2, 7, 9), (1, 5, 1), (1, 14, 14), (1, 16, 16)]),
    ("sort_kernel", 1024, 0, [(1, 32, 32)] * (DEVICE == "cuda")),
    ("number_kernel", 256, 0, [(1, 33, 40)]),
    ("count_kernel", 0, 2**26, [(2, 7, 9), (1, 5, 1), (3, 1, 47), (1, 13, 17), (1, 16, 16)]),
    (None, 256, 0, [(0, 4, 4)]),
    (None, 0, 2**26, [(0, 4, 4)]),
]
RANKED = [(kernel, sorts, counts, shape) for kernel, sorts, counts, shapes in RANKING for shape in shapes]


@pytest.mark.parametrize(("kernel", "sorts", "counts", "shape"), RANKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(kernel, sorts, counts, shape, dtype, monkeypatch):
    """As torch sorts: equal tokens as they stand, -0 and 0 among them, infinities in their places, NaN last."""
    path = importlib.import_module("ops.token_reallocation.triton_path")
    monkeypatch.setattr(path, "SORTED", sorts)
    monkeypatch.setattr(path, "COUNTED", counts)
    launched, launch = [None], path.launch
    monkeypatch.setattr(path, "launch", lambda run, *args, **rest: launched.append(run) or launch(run, *args, **rest))
    values = random(*shape).mul(4).round().div(2).to(DEVICE, dtype)
    values.flatten(1)[:, :: max(shape[1] * shape[2] // 6, 1)] = float("inf")
    for place, odd in enumerate((float("nan"), -0.0, 0.0, float("-inf"), -float("nan"))):
        values.flatten(1)[:, place : place + 1] = odd
    for given in (values, values.transpose(1, 2), values[:, ::2]):
        assert torch.equal(ops.rank_tokens(given, impl="triton"), ops.rank_tokens(given, impl="reference"))
        assert launched[-1] is (kernel and getattr(path, kernel))


def test_offsets_past_32_bits():
    machine.far_apart(DEVICE)


def test_a_forward_pass_holds_its_result_and_a_log_sum_exp():
    machine.forward_memory(DEVICE)


def test_gradients_of_a_packed_map_lie_packed():
    machine.packed_gradients(DEVICE)


def test_gradients_of_a_packed_pair_lie_packed():
    """Where keys and values come of one projection, and queries of another."""
    q = packed(1, 5, 6, 1, 8).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    pair = random(1, 5, 6, 2, 1, 8).to(DEVICE, torch.float32).requires_grad_()
    k, v = ops.unpack(pair)
    out = ops.window_attention(q, k, v, None, (4, 4), impl="triton").square().sum()
    dq, whole, dk, dv = torch.autograd.grad(out, (q, pair, k, v))
    assert whole.data_ptr() == dk.data_ptr() == dv.data_ptr() - 32 != dq.data_ptr()
    k, v = pair.unbind(3)
    want = torch.autograd.grad(ops.window_attention(q, k, v, None, (4, 4), impl="triton").square().sum(), (q, pair))
    assert torch.equal(dq, want[0]) and torch.equal(whole, want[1])


@pytest.mark.parametrize("used", ["qk", "v", "other"])
def test_other_gradients_of_a_packed_map_are_put_together(used):
    """Where a part has none, or also one from elsewhere, what kernels wrote is not the whole."""
    x = packed(1, 5, 6, 1, 8).to(DEVICE, torch.float32).requires_grad_()
    made = {
        "qk": lambda q, k, v: ops.window_attention(q, k, v.detach(), None, (4, 4), impl="triton"),
        "v": lambda q, k, v: v.square(),
        "other": lambda q, k, v: ops.window_attention(q, k, v, None, (4, 4), impl="triton") * v,
    }[used]
    (got,) = torch.autograd.grad(made(*ops.unpack(x)).square().sum(), x)
    (want,) = torch.autograd.grad(made(*x.unbind(3)).square().sum(), x)
    assert torch.equal(got, want)


def test_a_tables_gradient_is_the_same_in_64_bits():
    """What a launch for so many pairs would count is counted for a few."""
    launching, tiles = (importlib.import_module(f"ops.{name}") for name in ("launching", "tiles"))
    pairs = random(2, 6, 6).to(DEVICE, torch.float32)
    tables = [torch.zeros(2, 3, 5, device=DEVICE) for _ in range(2)]
    for table, far in zip(tables, (None, 1), strict=True):
        given = (pairs, table, 6, 6, 1, 0, 2, 3, 0, 0, 2, 3, 3, 5, far)
        launching.launch(tiles.backward_table_kernel, 2, *given, BLOCK=tiles.ENTRIES)
    assert torch.equal(*tables) and tables[0].all()
    torch.testing.assert_close(tables[0].sum((1, 2)), pairs.sum((1, 2)))


@pytest.mark.skipif(not INTERPRETED, reason="looks at addresses, of which no memory is behind the last")
def test_pairs_of_a_large_window_have_their_own_places(monkeypatch):
    """In a window of 216 x 215 tokens there are more than 2**31: where the program of the last tile stores them."""
    from triton.runtime import interpreter

    path, tiles = (importlib.import_module(f"ops.{name}") for name in ("window_attention.triton_path", "tiles"))
    q, rows, pairs = torch.zeros(1, 216, 215, 1, 16), torch.zeros(1, 216, 215, 1), torch.zeros(1)
    plan = path.Plan(q.shape, q.shape, (216, 215), False, False, "ieee")
    last, addresses = interpreter.TensorHandle(np.array([plan.parts**2 - 1], np.int32), interpreter.tl.int32), []
    builder = "triton.runtime.interpreter.InterpreterBuilder"
    monkeypatch.setattr(f"{builder}.create_get_program_id", lambda *_: last)
    monkeypatch.setattr(f"{builder}.create_masked_store", lambda _, pointers, *rest: addresses.append(pointers.data))
    given = (q, q, q, torch.zeros(1, 431, 429), None, None, q, rows, rows, rows, pairs, *tiles.strides(q, q, q, q))
    path.launch(path.backward_bias_kernel, 1, *given, 1, 1, *plan.sizes, 0.25, **plan.constants)
    (found,) = addresses
    places = (found.astype(np.int64) - pairs.data_ptr()) // pairs.element_size()
    assert places.max() == plan.lanes**2 - 1 >= 2**31
    assert places.min() == plan.lanes * (plan.lanes - 63) - 64 and len(np.unique(places)) == 64 * 64


CANCELLING = {
    "one_tile": lambda q, k, v, outside: ops.window_attention(q, k, v, None, (7, 7), outside=outside, impl="triton"),
    "tiles": lambda q, k, v, outside: ops.window_attention(q, k, v, None, (12, 12), outside=outside, impl="triton"),
    "neighborhood": lambda q, k, v, outside: ops.neighborhood_attention(
        q, k, v, None, (3, 7), (5, 2), outside=outside, impl="triton"
    ),
}


@pytest.mark.parametrize("call", CANCELLING.values(), ids=[f"{name}-float32" for name in CANCELLING])
def test_gradients_of_a_rows_logits_cancel(call):
    """Where all queries are equal, those of all keys cancel; not better than what is subtracted from them is exact."""
    for shift in (2, 4):
        _, k, v = (t.to(DEVICE, torch.float32) for t in packed(1, 13, 12, 1, 16).unbind(3))
        k0, v0 = (random(1, 16, seed=seed).to(DEVICE, torch.float32) for seed in (1, 2))
        k, k0 = k.requires_grad_(), k0.requires_grad_()
        out = call(torch.ones_like(k), k, v + shift, (k0, v0 + shift))
        dk, dk0 = torch.autograd.grad(out, (k, k0), random(*out.shape, seed=7).to(out))
        total = dk.double().sum((0, 1, 2)) + dk0.double()
        size = dk.double().abs().sum((0, 1, 2)) + dk0.double().abs()
        assert total.abs().max() <= torch.finfo(torch.float32).eps * size.max()


@pytest.mark.parametrize(
    "op", ["window_attention", "neighborhood_attention", "channel_attention", "super_tokens"], ids="{}-float32".format
)
def test_an_empty_batch(op):
    case = next(case for case in FIRST if case.op == op)
    made = {name: t.to(DEVICE, torch.float32) for name, t in case.make().items()}
    empty = {name: (t[:0] if t.dim() > 3 else t).requires_grad_() for name, t in made.items()}
    case.call(impl="triton", **empty).sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in empty.values())
