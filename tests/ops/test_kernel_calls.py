"""What surrounds a kernel: autograd, modes, autocast, refusals; under Triton's interpreter as test_kernels.py."""

from contextlib import nullcontext

import pytest
import torch
from devices import DEVICE, needs_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ops
from ops.check.cases import packed, random
from ops.recording import recording
from zoo.bench_profile import by_kind

pytestmark = needs_kernels


def window_call(q, bias):
    return ops.window_attention(q, q, q, bias, window=(4, 4), impl="triton")


def test_a_mode_sees_operators_that_are_left_out_without_one():
    """And gives the same bits."""
    q = packed(1, 5, 6, 1, 8).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    bias = random(1, 7, 7).to(DEVICE, torch.float32).requires_grad_()

    def run():
        out = window_call(q, bias)
        return out, *torch.autograd.grad(out.square().sum(), (q, bias))

    alone = run()
    with Names() as mode:
        seen = run()
    ours = [name for name in mode.names if "window" in name]
    assert ours == [f"attention_backbones.window_attention{end}.default" for end in ("", "_backward")]
    for got, want in zip(seen, alone, strict=True):
        assert torch.equal(got, want)


def test_a_profile_shows_kernels_as_operators_and_measures_the_ordinary_call():
    """Which calls none: an operator would have to copy the gradients of the parts of one map."""
    parts = ops.unpack(random(1, 8, 8, 3, 1, 16).to(DEVICE, torch.float32).requires_grad_())
    found = []

    def run():
        out = ops.window_attention(*parts, None, (4, 4), impl="triton")
        found.extend(torch.autograd.grad(out.sum(), parts))

    with torch.profiler.profile() as seen:
        run()
    events = {event.key: event for event in seen.key_averages()}
    for name in ("window_attention", "window_attention_backward"):
        event = events[f"attention_backbones::{name}"]
        assert event.count == 1 and event.self_cpu_time_total > 0 and not event.is_user_annotation
    assert len({t.untyped_storage().data_ptr() for t in found}) == 1
    assert by_kind(run, DEVICE)["attention"] > 0


def test_gradients_have_the_dtypes_of_their_tensors():
    """What the operator promises a compiler, where tensors are of two dtypes."""
    tokens, affinity = random(1, 2, 2, 8).to(DEVICE, torch.float32), random(1, 8, 8, 9).to(DEVICE, torch.float16)
    with Names():  # else no operator is called
        given = [t.requires_grad_() for t in (tokens, affinity)]
        out = ops.scatter_super_tokens(*given, (4, 4), impl="triton")
        found = torch.ops.attention_backbones.super_token_distribute_backward(out, *given, [4, 4], out)
    assert [t.dtype for t in found] == [torch.float32, torch.float16]


@pytest.mark.parametrize("learned", [True, False])
def test_a_gradient_that_is_not_computed_has_the_shape_that_a_compiler_is_told(learned):
    from ops import operators  # noqa: F401  registers them; these tests are skipped where triton is not installed

    x, affinity = random(1, 8, 8, 4).to(DEVICE, torch.float32), random(1, 8, 8, 9).to(DEVICE, torch.float32)
    out = torch.ops.attention_backbones.super_token_average(x, affinity, [4, 4], learned)
    backward = torch.ops.attention_backbones.super_token_average_backward.default
    torch.library.opcheck(backward, (out[0], x, affinity, [4, 4], learned, *out), test_utils="test_faketensor")
    found = backward(out[0], x, affinity, [4, 4], learned, *out)
    assert [t.shape for t in found] == [x.shape, affinity.shape] and found[1].any() == learned


def pixels_by_tokens(q):
    x = q.flatten(3)
    return ops.scatter_super_tokens(x[:, :2, :2], x[..., :9], (3, 3), impl="triton")


def merged_tokens(q):
    x, order = q.flatten(3), torch.arange(30, device=DEVICE).flip(0).expand(1, 2, -1)
    return ops.reallocate_tokens(x, None, [x[0, 0, :1, :3]], [x[0, 0, 0, :1]], [1], order, impl="triton")[0]


def test_gradients_of_a_super_token_that_no_pixel_is_near_to(far):
    """As in `torch`, which test_half_precision.py compares with the reference in float64."""
    x, found = far.to(DEVICE).requires_grad_(), {}
    for impl in ("triton", "torch"):
        tokens, _ = ops.super_tokens(x, 8, impl=impl)
        found[impl] = tokens, *torch.autograd.grad(tokens.sum(), x)
    torch.testing.assert_close(found["triton"], found["torch"], rtol=2e-3, atol=1e-7)


UNREAD = {
    "window_attention": lambda q: window_call(q, None),
    "channel_attention": lambda q: ops.channel_attention(q, q, q, impl="triton"),
    "super_tokens": lambda q: ops.super_tokens(q.flatten(3), (3, 3), impl="triton")[0],
    "scatter_super_tokens": pixels_by_tokens,
    "reallocate_tokens": merged_tokens,
}


@pytest.mark.parametrize("call", UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("seen", [False, True], ids=["alone", "operator"])
def test_a_result_that_no_backward_reads_may_be_changed(call, seen):
    q = packed(1, 5, 6, 1, 16).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    with Names() if seen else nullcontext():
        (got,) = torch.autograd.grad(call(q).mul_(2).square().sum(), q)
    (want,) = torch.autograd.grad((call(q) * 2).square().sum(), q)
    assert torch.equal(got, want)


@pytest.mark.parametrize("size, zeroed", [(6, False), (5, True)])
def test_what_is_written_anyway_is_not_filled_with_zeros_before(size, zeroed, monkeypatch):
    """The gradient of a query that all windows share, whose tokens are all on the map if windows divide it."""
    made, zeros = [], torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda x, *given, **rest: made.append(x) or zeros(x, *given, **rest))
    q, k = (random(1, n, n, 1, 8).to(DEVICE, torch.float32).requires_grad_() for n in (3, size))
    found = []
    for impl in ("reference", "triton"):
        made.clear()
        out = ops.window_attention(q, k, k, None, 3, impl=impl)
        found.append(torch.autograd.grad(out.square().sum(), (q, k)))
    assert bool(made) == zeroed
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("which", ["window", "tiles", "neighborhood"])
@pytest.mark.parametrize("seen", [False, True], ids=["alone", "operator"])
def test_the_gradient_of_a_table_is_computed_where_it_is_needed(which, seen):
    """By kernels of its own, but for the sums of one tile; an operator returns every gradient."""

    def launched(frozen):
        with recording() as written, Names() if seen else nullcontext():
            learned(which, torch.float32, torch.float32, frozen)
        return [launch.kernel.fn.__name__ for launch in written]

    own = ["backward_table_kernel"] if which == "window" else ["backward_bias_kernel", "backward_table_kernel"]
    assert launched(False) == launched(True) + own * (not seen)


def test_no_gradient_of_the_result():
    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.zeros_like(x)

        @staticmethod
        def backward(ctx, grad):
            return None

    q = packed(1, 5, 6, 1, 8).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    (Constant.apply(window_call(q, None)).sum() + q.sum()).backward()
    assert (q.grad == 1).all()


def test_checkpointed_gradients_are_the_same():
    """Each saved tensor may be asked for once there."""
    q = packed(1, 5, 6, 1, 8).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    (want,) = torch.autograd.grad(window_call(q, None).square().sum(), q)
    (got,) = torch.autograd.grad(checkpoint(window_call, q, None, use_reentrant=False).square().sum(), q)
    assert torch.equal(got, want)


class Names(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_route_may_lie_in_any_way():
    q = [random(3, 4, 6, 2, 8).to(DEVICE, torch.float32).requires_grad_() for _ in range(3)]
    route = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(18)])
    route = route.view(3, 6, 2).to(DEVICE)
    there = route.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # images lie next to each other
    found, expected = (
        torch.autograd.grad(ops.routed_attention(*q, (2, 3), 2, r, impl=impl).square().sum(), q)
        for r, impl in ((there, "triton"), (route, "torch"))
    )
    torch.testing.assert_close(found, expected)


NEGATED = {
    "window": lambda q, impl: ops.window_attention(q, q, q, None, (4, 4), impl=impl),
    "neighborhood": lambda q, impl: ops.neighborhood_attention(q, q, q, None, 3, impl=impl),
    "routed": lambda q, impl: ops.routed_attention(q, q, q, (2, 3), 6, impl=impl),
    "channel": lambda q, impl: ops.channel_attention(q, q, q, impl=impl),
    "super tokens": lambda q, impl: ops.super_tokens(q.flatten(3), (2, 3), impl=impl)[0],
    "rank": lambda q, impl: ops.rank_tokens(q[..., 0, 0], impl=impl),
}


@pytest.mark.parametrize("name", NEGATED)
def test_kernels_see_what_is_only_marked_as_negated(name):
    """torch negates it when an operator reads it, which a kernel is not."""
    q = random(2, 4, 6, 1, 8).to(DEVICE, torch.float32)
    marked = torch.complex(q, q).conj().imag
    assert marked.is_neg()
    torch.testing.assert_close(NEGATED[name](marked, "triton"), NEGATED[name](-q, "triton"), rtol=0, atol=0)
    if name == "rank":  # has no gradient
        return
    q.requires_grad_()
    grads = []
    for impl in ("triton", "reference"):
        out = NEGATED[name](q, impl)
        back = torch.complex(torch.zeros_like(out), out).conj() * torch.complex(*random(2, *out.shape).to(out))
        grads += torch.autograd.grad(back.sum().real, q)
    torch.testing.assert_close(*grads)


def test_second_derivative_is_refused():
    q = packed(1, 5, 6, 1, 8).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(window_call(q, None).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: use impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("seen", [False, True], ids=["alone", "operator"])
def test_batched_gradients_are_refused(seen):
    q = packed(1, 5, 6, 1, 8).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    with Names() if seen else nullcontext():
        out = window_call(q, None)
        with pytest.raises(RuntimeError, match=r"no batched gradients .*: use impl='reference', or torch.func.jacrev"):
            torch.autograd.grad(out, q, torch.ones_like(out)[None], is_grads_batched=True)


def test_autocast_decides_the_dtype():
    q, bias = random(1, 5, 6, 1, 8).to(DEVICE, torch.float32), random(1, 7, 7).to(DEVICE, torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        got, want = window_call(q, bias), ops.window_attention(q, q, q, bias, window=(4, 4), impl="torch")
    assert got.dtype == want.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3)


# with a table and keys beyond the map: windows of one tile, of several with and without an edge; neighborhoods
LEARNED = {
    "window": (5, 5, 4, ops.window_attention),
    "tiles": (12, 10, 9, ops.window_attention),
    "kept": (9, 9, 9, ops.window_attention),
    "neighborhood": (4, 9, 3, lambda *given, **options: ops.neighborhood_attention(*given, dilation=2, **options)),
}


def learned(which, maps, tables, frozen=False):
    """The result and the gradients of a call with maps and tables of these dtypes; all values are of float16.

    If `frozen`, the table of relative positions needs no gradient.
    """
    H, W, window, op = LEARNED[which]
    made = [(random(1, H, W, 2, 8, seed=i), maps) for i in range(3)]
    made += [(t, tables) for t in (random(2, 2 * window - 1, 2 * window - 1), random(2, 8), random(2, 8, seed=1))]
    q, k, v, bias, k0, v0 = given = [t.half().to(DEVICE, dtype).requires_grad_() for t, dtype in made]
    out = op(q, k, v, bias.requires_grad_(not frozen), window, outside=(k0, v0), impl="triton")
    return out, *torch.autograd.grad(out, [t for t in given if t.requires_grad], torch.ones_like(out))


@pytest.mark.parametrize("which", LEARNED)
def test_under_autocast_the_kernels_of_its_dtype_are_launched(which):
    """Those of a model in that dtype, although its parameters are float32."""
    with recording() as alone:
        learned(which, torch.float16, torch.float16)
    with recording() as written, torch.autocast(DEVICE, torch.float16):
        learned(which, torch.float32, torch.float32)
    assert written == alone
    assert any(which in f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__name__}" for launch in alone)


@pytest.mark.parametrize("which", LEARNED)
def test_under_autocast_gradients_of_tables_have_their_own_dtype(which):
    with torch.autocast(DEVICE, torch.float16):
        cast = learned(which, torch.float32, torch.float32)
    assert [t.dtype for t in cast] == [torch.float16] + [torch.float32] * 6
    alone = learned(which, torch.float16, torch.float16)
    assert all(torch.equal(got.half(), want) for got, want in zip(cast, alone, strict=True))


@pytest.mark.parametrize("which", ["window", "neighborhood"])
def test_tables_may_have_another_dtype_than_maps(which):
    """They are read as they are, and the same values give the same result."""
    mixed, alike = (learned(which, torch.float16, tables) for tables in (torch.float32, torch.float16))
    assert [t.dtype for t in mixed] == [torch.float16] * 4 + [torch.float32] * 3
    assert all(torch.equal(got.half(), want) for got, want in zip(mixed, alike, strict=True))


def test_autocast_decides_how_significance_is_rounded():
    q = random(1, 5, 6, 2, 8).to(DEVICE, torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        got = ops.significance(q, q, impl="triton")
    assert torch.equal(got, ops.significance(q.half(), q.half(), impl="triton"))


def test_too_many_channels():
    q = torch.zeros(1, 4, 4, 1, 129, device=DEVICE)
    with pytest.raises(RuntimeError, match="a head has 129 channels, and this kernel takes up to 128"):
        window_call(q, None)


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match=r"torch.float64, and kernels take float32"):
        window_call(random(1, 4, 4, 1, 8).to(DEVICE), None)
