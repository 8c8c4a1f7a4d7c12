"""What half precision must not do: an empty super token, a rounded ranking, windows that weigh more than others."""

import pytest
import torch

import ops
from ops.check.cases import random

IMPLS = ("torch", "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_super_token_that_no_pixel_is_near_to_is_zero(impl, dtype):
    """Half of the centre cell is like its neighbours on one side, half like those on the other, none like its mean."""
    v = torch.ones(64)
    x = torch.empty(1, 12, 12, 64)
    x[:, :, :6], x[:, :, 6:] = 3.8 * v, -3.8 * v
    tokens, affinity = ops.super_tokens(x.to(dtype), 4, impl=impl)
    assert tokens.dtype == affinity.dtype == dtype and tokens.isfinite().all()
    exact, _ = ops.super_tokens(x.double(), 4, impl="reference")
    assert tokens[0, :, 1].abs().max() <= exact[0, :, 1].abs().max() + 1e-3
    torch.testing.assert_close(tokens[:, :, ::2].double(), exact[:, :, ::2], rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_a_super_token_that_no_pixel_is_near_to(impl, far):
    """A gradient divided by the sum of its affinities is beyond float16's range."""

    def answers(x, impl):
        tokens, affinity = ops.super_tokens(x.requires_grad_(), 8, impl=impl)
        return affinity[..., 4], *torch.autograd.grad(tokens.sum(), x)

    (affinity, found), (_, exact) = answers(far.clone(), impl), answers(far.double(), "reference")
    if not affinity[:, 1::2, 8:16].any():  # in float16; then nothing reaches these pixels
        exact[:, 1::2, 8:16] = 0
    torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(torch.float16).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_of_zero_is_a_mean(dtype):
    """Without a mask, PyTorch leaves such logits unwritten: they hold what memory held."""
    q, k, v = (random(2, 6, 6, 2, 16, seed=i).to(dtype) for i in range(3))
    held = [torch.full((2**i,), float("nan"), dtype=dtype) for i in range(6, 16) for _ in range(8)]
    del held
    found = ops.window_attention(q.requires_grad_(), k, v, None, 3, scale=0.0, impl="torch")
    want = v.double().unflatten(2, (2, 3)).unflatten(1, (2, 3)).mean((2, 4))  # (B, 2, 2, heads, D)
    want = want.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps)
    (dq,) = torch.autograd.grad(found.sum(), q)
    assert not dq.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_windows_at_the_border_weigh_as_much_as_others(impl):
    q, k = random(2, 1, 10, 11, 2, 8).bfloat16()
    found = ops.significance(q, k, window=7, impl=impl)
    assert found.dtype == torch.float32
    sums = [found[0, down, right].sum() for down in (slice(7), slice(7, None)) for right in (slice(7), slice(7, None))]
    assert max(abs(float(total) - 1) for total in sums) < 1e-4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_regions_are_ranked_in_float32(dtype, autocast):
    q, k = random(2, 2, 28, 28, 4, 32).to(dtype)
    given = (q.float(), k.float()) if autocast else (q, k)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = ops.route_regions(*given, (7, 7), 4)
    exact = ops.route_regions(q.double(), k.double(), (7, 7), 4)
    assert (found == exact).double().mean() > 0.999
