"""The torch path of window attention: in how many shares images come changes nothing, and no share is left over."""

import importlib

import pytest
import torch

import ops
from ops.check.cases import packed, random

path = importlib.import_module("ops.window_attention.torch_path")
IMAGE = 4 * 9 * 8 * 2 * 8 * 8  # bytes of the four maps of an image, float64


@pytest.mark.parametrize(("fit", "shares"), [(0.3, 5), (1, 5), (2, 3), (3, 2), (4.5, 2), (5, 1), (70, 1)])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_shares(fit, shares, partition, monkeypatch):
    monkeypatch.setattr(path, "CACHED", int(fit * IMAGE / torch.get_num_threads()))
    came, whole = [], path.attend_tiles
    monkeypatch.setattr(path, "attend_tiles", lambda q, *rest: came.append(len(q)) or whole(q, *rest))
    q, k, v = packed(5, 9, 8, 2, 8).unbind(3)
    bias = random(2, 7, 5)
    got = ops.window_attention(q, k, v, bias, (4, 3), partition, impl="torch")
    assert len(came) == shares and sum(came) == 5 and max(came) - min(came) <= 1
    want = ops.window_attention(q, k, v, bias, (4, 3), partition, impl="reference")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_no_image():
    q, k, v = packed(0, 9, 8, 2, 8).unbind(3)
    assert ops.window_attention(q, k, v, None, (4, 3), impl="torch").shape == (0, 9, 8, 2, 8)
