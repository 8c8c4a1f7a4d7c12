"""What the ops mean, said again without a line of their references: dense masks, loops, conservation laws."""

import pytest
import torch
from torch.nn import functional as F

import ops
from ops.channel_attention.torch_path import logits
from ops.check.cases import packed, random


def dense(q, k, v, mask=None, scale=None):
    """Full attention over all tokens of the map; mask (heads, H * W, H * W)."""
    tokens = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*tokens, mask, scale=scale).transpose(1, 2).unflatten(1, q.shape[1:3])


def dense_window_mask(bias, H, W, window, partition):
    """(heads, H * W, H * W): the bias between pixels of one group, -inf between groups, one pair at a time."""
    (wh, ww), (gh, gw) = window, (-(-H // window[0]), -(-W // window[1]))
    mask = torch.full((bias.shape[0], H * W, H * W), float("-inf"), dtype=bias.dtype)
    for i in range(H * W):
        for j in range(H * W):
            (yi, xi), (yj, xj) = divmod(i, W), divmod(j, W)
            if partition == "block":
                same, dy, dx = (yi // wh, xi // ww) == (yj // wh, xj // ww), yj - yi, xj - xi
            else:
                same, dy, dx = (yi % gh, xi % gw) == (yj % gh, xj % gw), yj // gh - yi // gh, xj // gw - xi // gw
            if same:
                mask[:, i, j] = bias[:, dy + wh - 1, dx + ww - 1]
    return mask


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize(("H", "W", "window"), [(8, 6, (4, 3)), (7, 8, (3, 5)), (2, 3, (4, 4)), (6, 6, (6, 6))])
def test_window_is_full_attention_with_a_mask(H, W, window, partition, impl):
    q, k, v = packed(2, H, W, 2, 4).unbind(3)
    bias = random(2, 2 * window[0] - 1, 2 * window[1] - 1)
    out = ops.window_attention(q, k, v, bias, window=window, partition=partition, scale=0.7, impl=impl)
    want = dense(q, k, v, dense_window_mask(bias, H, W, window, partition), scale=0.7)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_outside_tokens_are_a_larger_map(partition, impl):
    q, k, v = packed(2, 7, 8, 2, 4).unbind(3)
    k0, v0, bias = random(2, 4, seed=1), random(2, 4, seed=2), random(2, 5, 9)
    out = ops.window_attention(q, k, v, bias, window=(3, 5), partition=partition, outside=(k0, v0), impl=impl)
    larger = [F.pad(t, [0, 0, 0, 0, 0, 2, 0, 2]) for t in (q, k, v)]
    for t, fill in zip(larger[1:], (k0, v0), strict=True):
        t[:, 7:], t[:, :, 8:] = fill, fill
    want = dense(*larger, dense_window_mask(bias, 9, 10, (3, 5), partition))[:, :7, :8]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_shared_query_is_the_query_of_every_window(partition, impl):
    _, k, v = packed(2, 7, 8, 2, 4).unbind(3)
    q, bias = random(2, 3, 4, 2, 4), random(2, 5, 7)
    spread = q.repeat_interleave(3, 1).repeat_interleave(2, 2)
    repeated = q.repeat(1, 3, 2, 1, 1) if partition == "block" else spread
    out, want = (
        ops.window_attention(t, k, v, bias, window=(3, 4), partition=partition, impl=impl)
        for t in (q, repeated[:, :7, :8])
    )
    torch.testing.assert_close(out, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_interior_windows_do_not_see_what_is_outside(impl):
    q, k, v = packed(1, 7, 10, 2, 4).unbind(3)
    nan = torch.full((2, 4), float("nan"), dtype=torch.float64)
    out = ops.window_attention(q, k, v, None, window=(3, 4), outside=(nan, nan), impl=impl)
    alone = ops.window_attention(q, k, v, None, window=(3, 4), impl=impl)
    torch.testing.assert_close(out[:, :6, :8], alone[:, :6, :8], rtol=0, atol=1e-15)
    assert out[:, 6:].isnan().all() and out[:, :, 8:].isnan().all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_border_windows_do_not_see_masked_keys(impl):
    """A border window is attention among its inside tokens alone, in value and gradient."""
    qkv, bias = packed(1, 5, 6, 2, 4).requires_grad_(), random(2, 7, 7)
    out = ops.window_attention(*qkv.unbind(3), bias, window=(4, 4), impl=impl)
    corner = qkv[:, 4:, 4:]
    tokens = dense(*corner.unbind(3), dense_window_mask(bias, 1, 2, (4, 4), "block"))
    torch.testing.assert_close(out[:, 4:, 4:], tokens, rtol=0, atol=1e-14)
    (grad,) = torch.autograd.grad(out[:, 4:, 4:].sin().sum(), qkv)
    (want,) = torch.autograd.grad(tokens.sin().sum(), qkv)
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-14)


def test_windows_are_independent_of_each_other():
    qkv = packed(1, 8, 8, 1, 4)
    out = ops.window_attention(*qkv.unbind(3), None, window=(4, 4))
    qkv[:, 4:, 4:] = 1e6 * random(1, 4, 4, 3, 1, 4, seed=5)
    changed = (ops.window_attention(*qkv.unbind(3), None, window=(4, 4)) != out).any(-1)[0, :, :, 0]
    assert changed[4:, 4:].all() and changed.sum() == 16


def test_neighborhood_that_covers_the_map_is_full_attention():
    q, k, v = packed(2, 5, 7, 2, 4).unbind(3)
    bias = random(2, 9, 13)
    y, x = torch.arange(35) // 7, torch.arange(35) % 7
    mask = bias[:, y - y[:, None] + 4, x - x[:, None] + 6]
    out = ops.neighborhood_attention(q, k, v, bias, window=(5, 7), scale=0.7)
    torch.testing.assert_close(out, dense(q, k, v, mask, scale=0.7), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (3, 2), ((5, 3), (1, 2))])
def test_every_query_sees_exactly_its_number_of_keys(window, dilation):
    H, W = 7, 8
    values = torch.eye(H * W, dtype=torch.float64).view(1, H, W, 1, H * W)  # the output is then the attention itself
    q, k = random(1, H, W, 1, H * W, seed=1), random(1, H, W, 1, H * W, seed=2)
    seen = ops.neighborhood_attention(q, k, values, None, window=window, dilation=dilation)[0, :, :, 0] > 0
    wh, ww = (window, window) if isinstance(window, int) else window
    assert (seen.sum(-1) == wh * ww).all()
    assert seen.view(H * W, H * W).diagonal().all()  # itself among them


def test_dilated_neighborhood_is_plain_neighborhood_on_each_sublattice():
    q, k, v = packed(2, 9, 8, 2, 4).unbind(3)
    bias = random(2, 5, 5)
    out = ops.neighborhood_attention(q, k, v, bias, window=3, dilation=(3, 2))
    for y in range(3):
        for x in range(2):
            part = (slice(None), slice(y, None, 3), slice(x, None, 2))
            want = ops.neighborhood_attention(q[part], k[part], v[part], bias, window=3)
            torch.testing.assert_close(out[part], want, rtol=0, atol=1e-14)


def test_neighborhood_shifts_inward_at_the_border():
    q, k, v = packed(1, 6, 6, 1, 4).unbind(3)
    out = ops.neighborhood_attention(q, k, v, None, window=3)
    keys, values = (t[:, :3, :3].flatten(1, 2).transpose(1, 2) for t in (k, v))
    corner = F.scaled_dot_product_attention(q[:, 0, 0].unsqueeze(2), keys, values)
    torch.testing.assert_close(out[:, 0, 0], corner.squeeze(2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("op", [ops.window_attention, ops.neighborhood_attention])
def test_a_bias_may_be_more_precise_than_the_map(op, impl):
    q, k, v = packed(2, 6, 9, 2, 4).unbind(3)
    bias = random(2, 5, 5)
    halves = [t.bfloat16() for t in (q, k, v)]
    out = op(*halves, bias.float(), (3, 3), impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), op(q, k, v, bias, (3, 3), impl="reference"), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_neighborhood_beyond_the_map(impl):
    """What lies outside is attended as if the map went on with these tokens: here until every line is one window."""
    q, k, v = packed(2, 4, 9, 2, 4).unbind(3)
    bias, outside = random(2, 5, 5), (random(2, 4, seed=1), random(2, 4, seed=2))
    out = ops.neighborhood_attention(q, k, v, bias, window=3, dilation=3, outside=outside, impl=impl)
    q = torch.cat([q, torch.zeros_like(q), torch.zeros_like(q)], 1)[:, :9]
    k, v = (torch.cat([t, token.expand(2, 5, 9, 2, 4)], 1) for t, token in zip((k, v), outside, strict=True))
    y, x = torch.arange(9) // 3, torch.arange(9) % 3
    mask = bias[:, y - y[:, None] + 2, x - x[:, None] + 2]
    want = torch.zeros_like(q)
    for part in ((slice(None), slice(i, None, 3), slice(j, None, 3)) for i in range(3) for j in range(3)):
        want[part] = dense(q[part], k[part], v[part], mask)
    torch.testing.assert_close(out, want[:, :4], rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_routed_to_all_regions_is_full_attention(impl):
    q, k, v = packed(2, 6, 8, 2, 4).unbind(3)
    out = ops.routed_attention(q, k, v, regions=(3, 2), topk=6, scale=0.7, impl=impl)
    torch.testing.assert_close(out, dense(q, k, v, scale=0.7), rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_routed_to_itself_is_window_attention(impl):
    q, k, v = packed(2, 6, 8, 2, 4).unbind(3)
    route = torch.arange(6).view(1, 6, 1).expand(2, -1, -1)
    out = ops.routed_attention(q, k, v, regions=(3, 2), topk=1, route=route, impl=impl)
    torch.testing.assert_close(out, ops.window_attention(q, k, v, None, window=(2, 4)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_routed_is_full_attention_with_a_mask(impl):
    """A pixel sees the pixels of the regions that its own is routed to: here with regions of 3 x 2 pixels."""
    q, k, v = packed(2, 6, 8, 2, 4).unbind(3)
    route = ops.route_regions(q, k, (2, 4), 3)
    region = (torch.arange(6) // 3)[:, None] * 4 + torch.arange(8) // 2
    chosen = torch.zeros(2, 8, 8, dtype=torch.bool).scatter(2, route, True)
    mask = chosen[:, region.flatten()][:, :, region.flatten()].unsqueeze(1)
    out = ops.routed_attention(q, k, v, regions=(2, 4), topk=3, scale=0.7, impl=impl)
    torch.testing.assert_close(out, dense(q, k, v, mask, scale=0.7), rtol=0, atol=1e-14)


def test_route_is_by_the_largest_product_of_means():
    q, k, _ = packed(1, 4, 6, 2, 4).unbind(3)
    q.requires_grad_()
    route = ops.route_regions(q, k, (2, 3), 2)
    cells = [(slice(None), slice(y, y + 2), slice(x, x + 2)) for y in (0, 2) for x in (0, 2, 4)]
    for r in range(6):
        scores = [float((q.detach()[cells[r]].mean((1, 2)) * k[cells[s]].mean((1, 2))).sum()) for s in range(6)]
        assert set(route[0, r].tolist()) == set(sorted(range(6), key=scores.__getitem__)[-2:])
    assert not route.requires_grad


def test_channel_attention_is_attention_between_channels():
    q, k, v = packed(2, 5, 6, 2, 8).unbind(3)
    across = [t.flatten(1, 2).permute(0, 2, 3, 1) for t in (k, v, q)]  # (B, heads, D, tokens)
    want = F.scaled_dot_product_attention(*across, scale=0.1).permute(0, 3, 1, 2).unflatten(1, (5, 6))
    torch.testing.assert_close(ops.channel_attention(q, k, v, scale=0.1), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_pooled_attention_over_the_whole_map_is_full_attention(impl):
    q, k, v = packed(2, 5, 6, 2, 4).unbind(3)
    want = dense(q, k, v, scale=0.7)
    torch.testing.assert_close(ops.pooled_attention(q, k, v, scale=0.7, impl=impl), want, rtol=0, atol=1e-14)
    sequence = ops.pooled_attention(q, k.flatten(1, 2), v.flatten(1, 2), scale=0.7, impl=impl)
    torch.testing.assert_close(sequence, want, rtol=0, atol=1e-14)


def super_tokens_by_loops(x, cell, iterations):
    """One image, pixel by pixel; affinity and denominator are constants."""
    (ch, cw), (H, W, C) = cell, x.shape
    h, w = -(-H // ch), -(-W // cw)
    big = F.pad(x, [0, 0, 0, w * cw - W, 0, h * ch - H])
    tokens = [
        [big[y * ch : (y + 1) * ch, z * cw : (z + 1) * cw].detach().mean((0, 1)) for z in range(w)] for y in range(h)
    ]
    for _ in range(iterations):
        total = [[0.0] * w for _ in range(h)]
        top = [[torch.zeros(C, dtype=x.dtype) for _ in range(w)] for _ in range(h)]
        affinity = torch.zeros(h * ch, w * cw, 9, dtype=x.dtype)
        for i in range(h * ch):
            for j in range(w * cw):
                near = [(i // ch + m // 3 - 1, j // cw + m % 3 - 1) for m in range(9)]
                real = [0 <= y < h and 0 <= z < w for y, z in near]
                logits = [
                    (big[i, j] * tokens[y][z]).sum().detach() * C**-0.5 if ok else x.new_zeros(())
                    for (y, z), ok in zip(near, real, strict=True)
                ]
                share = torch.stack(logits).softmax(0)
                affinity[i, j] = share
                for m, (y, z) in enumerate(near):
                    if real[m]:
                        total[y][z] += float(share[m])
                        top[y][z] = top[y][z] + share[m] * big[i, j]
        tokens = [[top[y][z] / (total[y][z] + 1e-12) for z in range(w)] for y in range(h)]
    return torch.stack([torch.stack(row) for row in tokens]), affinity[:H, :W]


@pytest.mark.parametrize(("H", "W", "cell", "iterations"), [(6, 6, (2, 3), 1), (5, 7, (2, 3), 1), (5, 4, (3, 2), 2)])
def test_super_tokens_pixel_by_pixel(H, W, cell, iterations):
    x = random(1, H, W, 3).requires_grad_()
    tokens, affinity = ops.super_tokens(x, cell, iterations)
    want_tokens, want_affinity = super_tokens_by_loops(x[0], cell, iterations)
    torch.testing.assert_close(tokens[0], want_tokens, rtol=0, atol=1e-13)
    torch.testing.assert_close(affinity[0], want_affinity, rtol=0, atol=1e-13)
    assert not affinity.requires_grad
    (grad,), (want,) = (torch.autograd.grad(t.sin().sum(), x) for t in (tokens, want_tokens))
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-13)


def test_scattered_super_tokens_are_sums_over_neighbors():
    tokens, affinity = random(1, 2, 3, 4), random(1, 5, 7, 9).softmax(-1)
    out = ops.scatter_super_tokens(tokens, affinity, (3, 3))
    for i in range(5):
        for j in range(7):
            want = torch.zeros(4, dtype=torch.float64)
            for m in range(9):
                y, z = i // 3 + m // 3 - 1, j // 3 + m % 3 - 1
                if 0 <= y < 2 and 0 <= z < 3:
                    want += affinity[0, i, j, m] * tokens[0, y, z]
            torch.testing.assert_close(out[0, i, j], want, rtol=0, atol=1e-14)


def test_significance_is_the_attention_a_key_receives():
    q, k = random(2, 4, 5, 3, 8), random(2, 2, 3, 3, 8, seed=3)
    eye = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)
    attention = F.scaled_dot_product_attention(q.flatten(1, 2).transpose(1, 2), k.flatten(1, 2).transpose(1, 2), eye)
    got = ops.significance(q, k, scale=8**-0.5)
    torch.testing.assert_close(got, attention.mean((1, 2)).view(2, 2, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("H", "W"), [(6, 8), (5, 7), (2, 3)])
def test_significance_in_windows(H, W):
    q, k, _ = packed(2, H, W, 2, 4).unbind(3)
    got = ops.significance(q, k, window=(3, 4))
    for y in range(0, H, 3):
        for x in range(0, W, 4):
            part = (slice(None), slice(y, y + 3), slice(x, x + 4))
            torch.testing.assert_close(got[part], ops.significance(q[part], k[part]), rtol=0, atol=1e-14)


def test_ties_keep_the_order_of_each_enumeration():
    order = ops.rank_tokens(torch.zeros(1, 3, 4))
    assert order[0, 0].tolist() == list(range(12))
    assert order[0, 1].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    rows, columns = ops.rank_tokens(random(2, 5, 6)).unbind(1)
    assert torch.equal(rows, columns)  # without ties there is one order


def test_reallocation_merges_runs_by_rank():
    x, significance = random(1, 4, 5, 3), random(1, 4, 5)
    weights, biases = [random(1, 3), random(1, 4), random(1, 1)], [random(1, seed=i) for i in range(3)]
    got, _ = ops.reallocate_tokens(x, significance, weights, biases, [1, 2, 1])
    ranked = x.view(20, 3)[significance.flatten().sort().indices]
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    groups = [torch.cat([ranked[:5], zeros]), torch.cat([ranked[5:15], zeros, zeros]), ranked[15:]]
    want = [
        w @ g[i : i + w.numel()] + b
        for g, w, b in zip(groups, weights, biases, strict=True)
        for i in range(0, len(g), w.numel())
    ]
    torch.testing.assert_close(got[0], torch.cat(want), rtol=0, atol=1e-14)
    assert got.shape[1] == 2 + 3 + 5


def test_reallocation_by_a_given_order_is_the_ranked_one():
    x, significance = random(2, 4, 6, 3), random(2, 4, 6)
    arguments = [[random(1, 2), random(1, 1)], [random(1), random(1, seed=1)], [1, 1]]
    ranked = ops.reallocate_tokens(x, significance, *arguments)
    given = ops.reallocate_tokens(x, None, *arguments, order=ops.rank_tokens(significance))
    assert all(torch.equal(a, b) for a, b in zip(ranked, given, strict=True))


def test_logits_of_channels_are_in_float32():
    """A large map's, of numbers in half precision: with a scale of 1 they are what rounding would show first."""
    k, v = torch.randn(2, 1, 28, 28, 2, 8).bfloat16()
    exact = torch.einsum("byxhi, byxhj -> bhij", k.double(), v.double()).flatten(0, 1)
    assert (logits(k, v, 1.0) - exact).abs().max() < 1e-3


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("window", [None, (3, 4), (4, 4)])
def test_significance_is_in_float32_at_least(window, impl):
    q = torch.randn(1, 6, 8, 2, 8).bfloat16()
    assert ops.significance(q, q, window, impl=impl).dtype == torch.float32
