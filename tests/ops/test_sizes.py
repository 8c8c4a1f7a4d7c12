"""Paths in ordinary operators compiled for maps of any size: one graph serves all remainders."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ops import (
    neighborhood_attention,
    pooled_attention,
    rank_tokens,
    reallocate_tokens,
    routed_attention,
    scatter_super_tokens,
    significance,
    super_tokens,
    window_attention,
)
from ops.sizes import ceil, covering, filled
from zoo.blocks import pad_to_multiple

SIZES = ((23, 36), (28, 35), (40, 27), (29, 42))  # 7, of windows and cells, divides no side, both, none, the second


def windows(x, table, **options):
    """Attention of (B, H, W, 3, heads, D) to itself."""
    q, k, v = x.unbind(3)
    return window_attention(q, k, v, table, window=(7, 7), **options)


def around(x, table):
    """Each pixel of (B, H, W, 3, heads, D) by its super tokens."""
    tokens, affinity = super_tokens(x.flatten(3), (7, 7), 2, True)
    return scatter_super_tokens(tokens, affinity, (7, 7)) + table.sum()


def bordered(x, table):
    return windows(x, table, outside=(table[:, 0, :4], table[:, 1, :4]))


def near(x, table, **options):
    q, k, v = x.unbind(3)
    return neighborhood_attention(q, k, v, table, window=7, **options)


def apart(x, table):
    return near(x, table, dilation=(3, 2))


def routed(x, table):
    x = filled(x, (3, 4))
    return routed_attention(*x.unbind(3), regions=(3, 4), topk=5) * table.sum()


def pooled(x, table):
    q, k, v = x.unbind(3)
    return pooled_attention(q, k[:, ::2, ::3], v[:, ::2, ::3]) * table.sum()


def merged(x, table):
    """Tokens in the order of what they receive, in windows and from all."""
    q, k, v = x.unbind(3)
    order = rank_tokens(significance(q, k, (7, 7)) + significance(q, k))
    weights = [table[:1, 0, :5], table[:1, 1, :1]]
    return torch.cat(reallocate_tokens(v.flatten(3), None, weights, [table[0, 0, :1]] * 2, [3, 2], order), 1)


def whole(x, table):
    """Zeros up to multiples of 5 and 7, then of 4."""
    x = filled(x.flatten(3), (5, 7)).permute(0, 3, 1, 2)
    return pad_to_multiple(x, 4) * table.sum()


CALLS = [windows, partial(windows, partition="grid"), bordered, around, near, apart, routed, pooled, merged, whole]


def assert_same(compiled, call, sizes):
    """Results and gradients of maps of these sizes."""
    torch.manual_seed(0)
    table = torch.randn(2, 13, 13, dtype=torch.float64, requires_grad=True)
    for height, width in sizes:
        x = torch.randn(2, height, width, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        out, want = compiled(x, table), call(x, table)
        torch.testing.assert_close(out, want)
        probe = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, (x, table), probe), torch.autograd.grad(want, (x, table), probe)
        )


@pytest.mark.parametrize("call", CALLS)
def test_one_graph_for_any_size(call):
    torch.compiler.reset()
    counted = CompileCounter()
    assert_same(torch.compile(call, dynamic=True, fullgraph=True, backend=counted), call, SIZES)
    assert counted.frame_count == 1


@pytest.mark.parametrize("call", [windows, partial(windows, partition="grid"), bordered, around])
def test_one_window_for_any_size(call):
    """A map that one window, or one cell, covers: its axes of one group need no copy, and views keep their strides."""
    torch.compiler.reset()

    def flat(x, table):
        return call(x, table).flatten(3)

    assert_same(torch.compile(flat, backend="aot_eager"), flat, ((4, 6), (7, 5), (3, 2)))


@pytest.mark.parametrize("side", range(1, 30))
def test_covering(side):
    for size in (1, 2, 7, 8):
        assert covering(side, size) == min(n for n in range(side, side + size) if n % size == 0)
        assert ceil(side, size) == -(-side // size)
