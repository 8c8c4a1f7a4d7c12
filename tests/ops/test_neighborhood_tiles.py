"""The torch path of neighborhood attention: however lines are cut into tiles, each query sees its own neighbors."""

import importlib

import pytest
import torch
import torch._dynamo.testing

import ops
from ops.check.cases import packed, random

path = importlib.import_module("ops.neighborhood_attention.torch_path")


def lengths(window, dilation):
    """Lines of one tile, of the last size that is one, of two tiles and more, with all remainders of a tile."""
    long = max(window, 16) * dilation
    return [window * dilation, long, *range(long + 1, long + 8 * dilation + 2, dilation), long + 8 * dilation + 1]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("window", [3, 7, 13])
def test_tiles(window, dilation, monkeypatch):
    monkeypatch.setattr(path, "CACHED", 1)  # one image at a time
    for length in lengths(window, dilation):
        q, k, v = (t.detach().requires_grad_() for t in packed(2, length, window, 1, 4).unbind(3))
        bias = random(1, 2 * window - 1, 2 * window - 1).requires_grad_()
        args = (q, k, v, bias, window, (dilation, 1))
        want = ops.neighborhood_attention(*args, impl="reference")
        with torch.no_grad():
            torch.testing.assert_close(ops.neighborhood_attention(*args, impl="torch"), want, rtol=0, atol=1e-13)
        got = ops.neighborhood_attention(*args, impl="torch")
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
        grad = random(*want.shape)
        got, want = (torch.autograd.grad(out, (q, k, v, bias), grad) for out in (got, want))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fit", "shares"), [(0.3, 5), (1, 5), (2, 3), (3, 2), (5, 1), (70, 1)])
def test_shares(fit, shares, monkeypatch):
    """As many images at a time as the caches hold."""
    tiles, queries, keys = 9 * 2 * 8, 6 * 6, 8 * 8
    image = 2 * tiles * (queries + keys) * 8  # bytes of what is copied, float64
    monkeypatch.setattr(path, "CACHED", int(fit * image / torch.get_num_threads()))
    came, whole = [], path.attend_tiles
    monkeypatch.setattr(path, "attend_tiles", lambda q, *rest: came.append(len(q)) or whole(q, *rest))
    q, k, v = packed(5, 18, 18, 2, 8).unbind(3)
    got = ops.neighborhood_attention(q, k, v, None, 3, impl="torch")
    assert len(came) == shares and sum(came) == 5
    torch.testing.assert_close(got, ops.neighborhood_attention(q, k, v, None, 3, impl="reference"), rtol=0, atol=1e-13)


def test_sizes_share_a_graph():
    """With `dynamic=True` a graph serves all larger maps: how they divide into tiles is nothing it depends on."""
    counted = torch._dynamo.testing.CompileCounter()

    def attend(*maps):
        return ops.neighborhood_attention(*maps, window=7)

    compiled = torch.compile(attend, dynamic=True, fullgraph=True, backend=counted)
    for size in [(56, 56), (57, 60), (64, 48), (70, 71), (80, 100)]:
        q, k, v = (random(2, *size, 1, 8, seed=i) for i in range(3))
        maps = q, k, v, random(1, 13, 13)
        torch.testing.assert_close(compiled(*maps), attend(*maps), rtol=0, atol=1e-13)
    assert counted.frame_count == 2  # square, and not


def test_no_image():
    q, k, v = packed(0, 18, 18, 2, 8).unbind(3)
    assert ops.neighborhood_attention(q, k, v, None, 3, impl="torch").shape == (0, 18, 18, 2, 8)
