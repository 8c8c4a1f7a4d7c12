"""The torch path of window attention: in how many shares images come changes nothing, and no share is left over."""

import importlib

import pytest
import torch

import ops
from ops.check.cases import packed, random

path = importlib.import_module("ops.window_attention.torch_path")
TOKENS = 9 * 8 * 2  # of the heads of an image


@pytest.mark.parametrize(("fit", "shares"), [(0.3, 5), (1, 5), (2, 3), (3, 2), (4.5, 2), (5, 1), (70, 1)])
@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize(("few", "held"), [(11, 4 * 8), (12, 4 * 8 + 2 * 12)], ids=["fused", "matmuls"])
def test_shares(few, held, fit, shares, partition, monkeypatch):
    """Of matmuls a share has logits and softmax too, beside its four maps."""
    monkeypatch.setattr(path, "matmul_keys", lambda k: few)
    monkeypatch.setattr(path, "CACHED", int(fit * TOKENS * held * 8 / torch.get_num_threads()))
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
