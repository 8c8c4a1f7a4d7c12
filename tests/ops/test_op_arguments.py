"""What the ops take: shapes, dtypes, devices and numbers, and what is said of any other argument."""

import re

import numpy as np
import pytest
import torch

import ops
from ops.check.cases import packed, random
from ops.checks import factor

BOTH = ("torch", "reference")
Q = packed(2, 6, 8, 2, 4).select(3, 0)
X = random(2, 6, 8, 4)
ONE = [random(1, 2)], [random(1)], [1]
NUMBER = torch.tensor(1.0)
BAD = {
    "partition": (lambda: ops.window_attention(Q, Q, Q, None, (2, 2), "tile"), "partition is 'tile'"),
    "window": (lambda: ops.window_attention(Q, Q, Q, None, (0, 2)), "window is 0 x 2"),
    "window bias": (lambda: ops.window_attention(Q, Q, Q, random(2, 3, 5), (2, 2)), r"expected .* \(2, 3, 3\)"),
    "window k": (lambda: ops.window_attention(Q, Q[:, 1:], Q, None, (2, 2)), "expected both"),
    "window q": (lambda: ops.window_attention(Q[:, :3], Q, Q, None, (2, 2)), r"or one window, \[2, 2, 2, 2, 4\]"),
    "window outside": (
        lambda: ops.window_attention(Q, Q, Q, None, (4, 4), outside=(X, X)),
        r"both \(heads, D\), \(2, 4\)",
    ),
    "even": (lambda: ops.neighborhood_attention(Q, Q, Q, None, 4), "expected an odd window"),
    "dilation": (lambda: ops.neighborhood_attention(Q, Q, Q, None, 3, 0), "dilation >= 1"),
    "small": (lambda: ops.neighborhood_attention(Q, Q, Q, None, 3, (3, 1)), "6 rows, .* needs 9"),
    "neighborhood outside": (
        lambda: ops.neighborhood_attention(Q, Q, Q, None, 3, outside=(X, X)),
        r"both \(heads, D\), \(2, 4\)",
    ),
    "shapes": (lambda: ops.neighborhood_attention(Q, Q, Q[1:], None, 3), r"expected one shape \(B, H, W, heads, D\)"),
    "regions": (lambda: ops.routed_attention(Q, Q, Q, (4, 2), 1), "6 x 8 does not divide into 4 x 2"),
    "topk": (lambda: ops.route_regions(Q, Q, (3, 2), 7), "topk is 7: expected 1 to 6"),
    "route regions shapes": (lambda: ops.route_regions(Q, Q[:, :3], (3, 2), 1), "q and k are .*: expected one shape"),
    "route regions axes": (lambda: ops.route_regions(X, X, (3, 2), 1), r"expected one shape \(B, H, W, heads, D\)"),
    "route of floats": (
        lambda: ops.routed_attention(Q, Q, Q, (3, 2), 1, torch.zeros(2, 6, 1)),
        "route is torch.float32: expected int64",
    ),
    "route": (lambda: ops.routed_attention(Q, Q, Q, (3, 2), 2, Q), r"expected \(B, R, topk\), \(2, 6, 2\)"),
    "order of floats": (
        lambda: ops.reallocate_tokens(X, None, *ONE, order=torch.zeros(2, 2, 48)),
        "order is torch.float32: expected int64",
    ),
    "regions that are not": (
        lambda: ops.routed_attention(
            Q, Q, Q, (3, 2), 1, torch.tensor([-1, 0, 1, 2, 3, 4]).view(1, 6, 1).expand(2, -1, -1)
        ),
        "route has values from -1 to 4: expected 0 to 5",
    ),
    "channel": (lambda: ops.channel_attention(X, X, X), r"expected one shape"),
    "pooled": (lambda: ops.pooled_attention(Q, X, X), "expected .* both"),
    "pooled q without axes": (lambda: ops.pooled_attention(NUMBER, Q, Q), "expected q .* both"),
    "pooled k without axes": (lambda: ops.pooled_attention(Q, NUMBER, NUMBER), "expected q .* both"),
    "topk of a truth value": (lambda: ops.routed_attention(Q, Q, Q, 1, True), "topk is True: expected a whole number"),
    "arguments mixed up": (
        lambda: ops.routed_attention(Q, Q, Q, torch.zeros(2, 6, 2), (3, 2)),
        r"regions is a Tensor of shape \(2, 6, 2\): expected one whole number, or two",
    ),
    "topk of an array": (
        lambda: ops.routed_attention(Q, Q, Q, 1, np.ones(3)),
        r"is a ndarray of shape \(3,\): expected",
    ),
    "iterations of a truth value": (lambda: ops.super_tokens(X, 2, True), "iterations is True: expected a whole"),
    "complex significance": (lambda: ops.rank_tokens(X[..., 0] * 1j), "significance is torch.complex128: expected"),
    "8-bit significance": (
        lambda: ops.reallocate_tokens(X, X[..., 0].to(torch.float8_e5m2), *ONE),
        "significance is torch.float8_e5m2: expected",
    ),
    "topk of no whole number": (lambda: ops.routed_attention(Q, Q, Q, (3, 2), 1.0), "topk is 1.0: expected a whole"),
    "route topk": (lambda: ops.route_regions(Q, Q, (3, 2), "1"), "topk is '1': expected a whole number"),
    "cell": (lambda: ops.super_tokens(X, (0, 1)), "cell is 0 x 1"),
    "iterations": (lambda: ops.super_tokens(X, (2, 2), 0), "iterations is 0"),
    "iterations of no whole number": (lambda: ops.super_tokens(X, (2, 2), 1.5), "iterations is 1.5: expected a whole"),
    "super map": (lambda: ops.super_tokens(Q, (2, 2)), r"expected \(B, H, W, C\)"),
    "scatter": (lambda: ops.scatter_super_tokens(X, random(2, 6, 8, 9), (2, 2)), "tokens are .* affinity"),
    "scattered images": (lambda: ops.scatter_super_tokens(X, random(3, 6, 8, 9), (1, 1)), "tokens are .* affinity"),
    "significance": (lambda: ops.significance(Q, Q[..., 1:]), "q and k are"),
    "significance window": (lambda: ops.significance(Q, Q[:, 1:], (2, 2)), "for window"),
    "groups": (lambda: ops.reallocate_tokens(X, X[..., 0], ONE[0], ONE[1], [1, 1]), "1 weights, 1 biases"),
    "weight": (lambda: ops.reallocate_tokens(X, X[..., 0], [random(2, 1)], *ONE[1:]), r"of group 0 is .*\(1, run\)"),
    "no weight": (lambda: ops.reallocate_tokens(X, X[..., 0], [random(1, 0)], *ONE[1:]), r"expected \(1, run\)"),
    "bias": (lambda: ops.reallocate_tokens(X, X[..., 0], ONE[0], [random(4)], [1]), r"its bias .*\[4\]\): .* \(1,\)"),
    "no order": (lambda: ops.reallocate_tokens(X, None, *ONE), "neither a significance nor an order is given"),
    "another significance": (
        lambda: ops.reallocate_tokens(X, X[:, 1:, :, 0], *ONE),
        r"significance is torch.Size\(\[2, 5, 8\]\): expected \(B, H, W\), \[2, 6, 8\]",
    ),
    "share": (lambda: ops.reallocate_tokens(X, X[..., 0], *ONE[:2], [1.5]), "a share is 1.5: expected a whole number"),
    "order": (lambda: ops.reallocate_tokens(X, None, *ONE, order=X), r"expected \(B, 2, H \* W\), \(2, 2, 48\)"),
    "tokens that are not": (
        lambda: ops.reallocate_tokens(X, None, *ONE, order=torch.arange(1, 49).expand(2, 2, -1)),
        "order has values from 1 to 48: expected 0 to 47",
    ),
}
EMPTY = {
    "window": lambda rows: ops.window_attention(*[Q[:, :rows]] * 3, None, (2, 2)),
    "neighborhood": lambda rows: ops.neighborhood_attention(*[Q[:, :rows]] * 3, None, 1),
    "routed": lambda rows: ops.routed_attention(*[Q[:, :rows]] * 3, (1, 1), 1),
    "route": lambda rows: ops.route_regions(*[Q[:, :rows]] * 2, (1, 1), 1),
    "channel": lambda rows: ops.channel_attention(*[Q[:, :rows]] * 3),
    "super tokens": lambda rows: ops.super_tokens(X[:, :rows], (2, 2)),
    "scatter": lambda rows: ops.scatter_super_tokens(X[:, :rows], random(2, 6, 8, 9)[:, :rows], (1, 1)),
    "reallocation": lambda rows: ops.reallocate_tokens(X[:, :rows], X[:, :rows, :, 0], *ONE),
    "significance": lambda rows: ops.significance(Q[:, :rows], Q),
    "rank": lambda rows: ops.rank_tokens(X[:, :rows, :, 0]),
    "significance of keys": lambda rows: ops.significance(Q, Q[:, :rows]),
}
MAPS = {
    "window": lambda q: ops.window_attention(q, q, q, None, (2, 2)),
    "neighborhood": lambda q: ops.neighborhood_attention(q, q, q, None, 3),
    "routed": lambda q: ops.routed_attention(q, q, q, (3, 2), 2),
    "route": lambda q: ops.route_regions(q, q, (3, 2), 2),
    "channel": lambda q: ops.channel_attention(q, q, q),
    "pooled": lambda q: ops.pooled_attention(q, q, q),
    "super tokens": lambda q: ops.super_tokens(q[..., 0, :] if q.shape[3] else q[..., 0], (2, 2)),
    "scatter": lambda q: ops.scatter_super_tokens(q.flatten(3), random(2, 6, 8, 9), (1, 1)),
    "significance": lambda q: ops.significance(q, q),
    "reallocation": lambda q: ops.reallocate_tokens(q.flatten(3), None, *ONE, torch.arange(48).expand(2, 2, -1)),
}
PAIRS = {
    "window": lambda n: ops.window_attention(Q, Q, Q, None, n),
    "neighborhood": lambda n: ops.neighborhood_attention(Q, Q, Q, None, 1, n),
    "routed": lambda n: ops.routed_attention(Q, Q, Q, n, 1),
    "route": lambda n: ops.route_regions(Q, Q, n, 1),
    "super tokens": lambda n: ops.super_tokens(X, n)[0],
    "scatter": lambda n: ops.scatter_super_tokens(X[:, :3, :4], random(2, 6, 8, 9), n),
    "significance": lambda n: ops.significance(Q, Q, n),
}
# `far` moves a tensor of each
DEVICES = {
    "window": lambda far: ops.window_attention(far(Q), Q, Q, None, 2),
    "scatter": lambda far: ops.scatter_super_tokens(X, far(random(2, 6, 8, 9)), 1),
    "window v": lambda far: ops.window_attention(Q, Q, far(Q), None, 2),
    "window bias": lambda far: ops.window_attention(Q, Q, Q, far(random(2, 3, 3)), 2),
    "window outside": lambda far: ops.window_attention(Q, Q, Q, None, 4, outside=(Q[0, 0, 0], far(Q[0, 0, 0]))),
    "neighborhood": lambda far: ops.neighborhood_attention(Q, far(Q), Q, None, 3),
    "neighborhood bias": lambda far: ops.neighborhood_attention(Q, Q, Q, far(random(2, 5, 5)), 3),
    "neighborhood outside": lambda far: ops.neighborhood_attention(Q, Q, Q, None, 7, outside=[far(Q[0, 0, 0])] * 2),
    "channel": lambda far: ops.channel_attention(far(Q), Q, Q),
    "pooled": lambda far: ops.pooled_attention(Q, Q, far(Q)),
    "routed": lambda far: ops.routed_attention(Q, far(Q), Q, 2, 1),
    "route": lambda far: ops.route_regions(far(Q), Q, 2, 1),
    "given route": lambda far: ops.routed_attention(Q, Q, Q, 2, 1, far(torch.zeros(2, 4, 1).long())),
    "significance": lambda far: ops.significance(Q, far(Q)),
    "reallocation": lambda far: ops.reallocate_tokens(X, far(X[..., 0]), *ONE),
    "weight": lambda far: ops.reallocate_tokens(X, X[..., 0], [far(ONE[0][0])], *ONE[1:]),
    "bias": lambda far: ops.reallocate_tokens(X, X[..., 0], ONE[0], [far(ONE[1][0])], [1]),
    "order": lambda far: ops.reallocate_tokens(X, None, *ONE, far(ops.rank_tokens(X[..., 0]))),
}
TYPES = {
    "neighborhood": lambda q, k: ops.neighborhood_attention(q, q, k, None, 3),
    "window": lambda q, k: ops.window_attention(q, q, k, None, 2),
    "routed": lambda q, k: ops.routed_attention(q, k, q, (3, 2), 2),
    "route": lambda q, k: ops.route_regions(q, k, (3, 2), 2),
    "channel": lambda q, k: ops.channel_attention(q, k, k),
    "pooled": lambda q, k: ops.pooled_attention(q, k, k),
    "significance": lambda q, k: ops.significance(q, k),
}
SCALED = {
    "window": lambda scale: ops.window_attention(Q, Q, Q, None, (2, 2), scale=scale),
    "neighborhood": lambda scale: ops.neighborhood_attention(Q, Q, Q, None, 3, scale=scale),
    "routed": lambda scale: ops.routed_attention(Q, Q, Q, (3, 2), 2, scale=scale),
    "channel": lambda scale: ops.channel_attention(Q, Q, Q, scale),
    "pooled": lambda scale: ops.pooled_attention(Q, Q, Q, scale),
    "significance": lambda scale: ops.significance(Q, Q, scale=scale),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("scale", [torch.tensor(0.5, requires_grad=True), torch.rand(4)])
def test_a_scale_is_a_number(name, scale):
    """The gradient of a learned one would be lost, and several would be taken for channels."""
    with pytest.raises(ValueError, match="scale is a tensor: expected a number; multiply q"):
        SCALED[name](scale)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("scale", [1j, "0.5", b"1", [0.5], torch.tensor(1j), 10**400], ids=repr)
def test_a_scale_is_a_real_number(name, scale):
    with pytest.raises(ValueError, match=rf"scale is {re.escape(repr(scale))}: expected a number"):
        SCALED[name](scale)


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_may_be_a_tensor_in_one_graph(name):
    """Also where fused attention runs, which takes a number."""
    call = torch.compile(SCALED[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(torch.tensor(0.2, dtype=torch.float64)), SCALED[name](0.2))


def test_a_compiler_says_what_is_wrong_with_a_window():
    """It takes NumPy's numbers for arrays, which it cannot print."""
    call = torch.compile(lambda q, n: ops.window_attention(q, q, q, None, n), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"window is a .*: expected one whole number, or two"):
        call(Q, np.int64(2))


def test_a_table_is_a_tensor():
    for op in (ops.window_attention, ops.neighborhood_attention):
        with pytest.raises(ValueError, match=r"bias is 1\.0: expected a table \(heads, 2\*wh-1, 2\*ww-1\)"):
            op(Q, Q, Q, 1.0, 3)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), np.float32(0.5), np.float64(0.5)], ids=repr)
def test_a_number_of_another_kind_is_one(scale):
    """Kernels are told Python's alone."""
    assert type(factor(scale, 4)) is float and factor(scale, 4) == factor(None, 4) == 0.5
    for call in SCALED.values():
        torch.testing.assert_close(call(scale), call(0.5), rtol=0, atol=0)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_trace_computes_a_scale_in_float64():
    x = random(2, 7)
    traced = torch.jit.trace(lambda t: t * factor(None, t.shape[-1]), x)
    for t in (x, x[:, :5]):
        torch.testing.assert_close(traced(t), t * t.shape[-1] ** -0.5, rtol=1e-15, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("impl", BOTH)
def test_traced_super_tokens_are_in_float64(impl):
    def call(x):
        return ops.super_tokens(x, (2, 2), impl=impl)

    x = random(2, 6, 8, 7)
    torch.testing.assert_close(torch.jit.trace(call, x)(x), call(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("call", EMPTY.values(), ids=EMPTY)
def test_a_map_has_pixels(call):
    call(1)
    with pytest.raises(ValueError, match=r"is torch.Size\(\[2, 0, 8.*: expected a map of at least 1 x 1 pixels"):
        call(0)


@pytest.mark.parametrize("call", MAPS.values(), ids=MAPS)
def test_a_map_has_channels_of_floating_point_numbers(call):
    call(Q)
    for empty in (Q[..., :0], Q[..., :0, :]):
        with pytest.raises(ValueError, match="expected at least one head of at least one channel"):
            call(empty)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"is {dtype}: expected float16, bfloat16, float32 or float64"):
            call(Q.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_what_is_learned_is_of_floating_point_numbers(dtype):
    heads, D = Q.shape[-2:]
    table, other = torch.zeros(heads, 3, 3, dtype=dtype), torch.zeros(heads, D, dtype=dtype)
    weight, bias, shares = ONE
    for call in (
        lambda: ops.reallocate_tokens(X, X[..., 0], [weight[0].to(dtype)], bias, shares),
        lambda: ops.reallocate_tokens(X, X[..., 0], weight, [bias[0].to(dtype)], shares),
        lambda: ops.window_attention(Q, Q, Q, table, 2),
        lambda: ops.window_attention(Q, Q, Q, None, 2, outside=(other.float(), other)),
        lambda: ops.neighborhood_attention(Q, Q, Q, None, 3, outside=(other, other.float())),
    ):
        with pytest.raises(ValueError, match=f"is {dtype}: expected float16, bfloat16, float32 or float64"):
            call()


@pytest.mark.parametrize(
    "outside, said",
    [
        (Q[0, 0, 0], r"a Tensor of shape \(2, 4\)"),
        ((Q[0, 0, 0],), r"\(Tensor\)"),
        ((Q[0, 0, 0], None), r"\(Tensor, NoneType\)"),
        ([Q[0, 0, 0]] * 3, r"\(Tensor, Tensor, Tensor\)"),
        (0.0, "0.0"),
    ],
)
def test_what_is_outside_is_a_key_and_a_value(outside, said):
    for call in (
        lambda: ops.window_attention(Q, Q, Q, None, 4, outside=outside),
        lambda: ops.neighborhood_attention(Q, Q, Q, None, 7, outside=outside),
    ):
        with pytest.raises(ValueError, match=f"outside is {said}: expected \\(k0, v0\\)"):
            call()


@pytest.mark.parametrize("call", PAIRS.values(), ids=PAIRS)
def test_one_number_is_for_both_axes(call):
    want = call((2, 2))
    for same in (2, np.int64(2), [2, 2], (np.int32(2), 2)):
        assert torch.equal(call(same), want)
    for other in ((2,), (2, 2, 2), 2.0, ("2", 2), torch.tensor(2), True, (True, True)):
        with pytest.raises(ValueError, match="expected one whole number, or two"):
            call(other)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("call", DEVICES.values(), ids=DEVICES)
def test_tensors_are_on_one_device(call, impl):
    """A product of a meta tensor and another one would be no error, but random numbers."""
    with ops.implementation(impl):
        call(lambda t: t)
        with pytest.raises(ValueError, match=r"are on .*meta.*: expected one device"):
            call(lambda t: t.to("meta"))


@pytest.mark.parametrize("call", TYPES.values(), ids=TYPES)
def test_maps_are_of_one_dtype(call):
    """But where autocast gives them one, which leaves float64 alone."""
    with pytest.raises(ValueError, match=r"are .*torch.float(16|32), torch.float(16|32).*: expected one dtype"):
        call(Q.half(), Q.float())
    with torch.autocast("cpu", torch.bfloat16):
        call(Q.half(), Q.float())
        with pytest.raises(ValueError, match=r"torch.float64.*: expected one dtype"):
            call(Q, Q.float())


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_is_cast(dtype, impl):
    """A query to the dtype of keys, affinity to that of tokens, what merges tokens and its order to what fits them."""
    q, x, merge = Q.to(dtype), X.to(dtype), ([random(1, 2).float()], [random(1).float()], [1])
    assert ops.window_attention(Q.float(), q, q, None, 2, impl=impl).dtype == dtype
    affinity = random(2, 6, 8, 9).float()
    out = ops.scatter_super_tokens(x, affinity, 1, impl=impl)
    assert torch.equal(out, ops.scatter_super_tokens(x, affinity.to(dtype), 1, impl=impl)) and out.dtype == dtype
    order = ops.rank_tokens(X[..., 0])
    out = ops.reallocate_tokens(x, None, *merge, order.int(), impl=impl)
    want = ops.reallocate_tokens(x, None, *([t.to(dtype) for t in given] for given in merge[:2]), [1], order, impl=impl)
    assert all(map(torch.equal, out, want)) and out[0].dtype == dtype
    route = ops.route_regions(q, q, 2, 1)
    given = [ops.routed_attention(q, q, q, 2, 1, t, impl=impl) for t in (route, route.int())]
    assert torch.equal(*given)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
