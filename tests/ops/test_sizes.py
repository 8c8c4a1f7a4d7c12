"""Paths in ordinary operators compiled for maps of any size: one graph serves all remainders."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ops import scatter_super_tokens, super_tokens, window_attention
from ops.sizes import covering
from zoo.biformer import fill
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


def filled(x, table):
    return windows(x, table, outside=(table[:, 0, :4], table[:, 1, :4]))


def whole(x, table):
    """Zeros up to multiples of 5 and 7, then of 4."""
    x = fill(x.flatten(3), (5, 7)).permute(0, 3, 1, 2)
    return pad_to_multiple(x, 4) * table.sum()


@pytest.mark.parametrize("call", [windows, partial(windows, partition="grid"), filled, around, whole])
def test_one_graph_for_any_size(call):
    torch.compiler.reset()
    counted = CompileCounter()
    compiled = torch.compile(call, dynamic=True, fullgraph=True, backend=counted)
    torch.manual_seed(0)
    table = torch.randn(2, 13, 13, dtype=torch.float64, requires_grad=True)
    for height, width in SIZES:
        x = torch.randn(2, height, width, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        out, want = compiled(x, table), call(x, table)
        torch.testing.assert_close(out, want)
        probe = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, (x, table), probe), torch.autograd.grad(want, (x, table), probe)
        )
    assert counted.frame_count == 1


@pytest.mark.parametrize("side", range(1, 30))
def test_covering(side):
    for size in (1, 2, 7, 8):
        assert covering(side, size) == min(n for n in range(side, side + size) if n % size == 0)
