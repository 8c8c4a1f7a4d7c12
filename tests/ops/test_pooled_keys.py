"""The torch path of pooled attention: keys that are padded to whole registers are not attended to."""

import importlib

import pytest
import torch

import ops
from ops.check.bound import share
from ops.check.cases import random

path = importlib.import_module("ops.pooled_attention")


def inputs(keys, dtype=torch.float32):
    return random(2, 7, 10, 2, 8).to(dtype), *random(2, keys, 2, 2, 8).to(dtype).unbind(2)


CASES = [(3, 3), (5, 16), (16, 16), (20, 20), (21, 32), (60, 64), (69, 80), (75, 75)]


@pytest.mark.parametrize(("keys", "count"), CASES)
def test_padded_keys_have_no_weight(keys, count, fused_keys, monkeypatch):
    monkeypatch.setattr(path, "HAS_AVX512", True)
    monkeypatch.setattr(path, "HAS_BFLOAT16", False)
    q, k, v = inputs(keys)
    q[0], v[1] = 40 * q[0], v[1] - 100  # sharp rows, and values far from the zeros of padding
    got = ops.pooled_attention(q, k, v)
    assert fused_keys == [count]
    truth, eager = (
        ops.pooled_attention(*(t.to(d) for t in (q, k, v)), impl="reference") for d in (torch.double, q.dtype)
    )
    assert share(truth, eager, got) <= 1


@pytest.mark.parametrize("wide", [False, True])
def test_only_float32_without_gradients_is_padded(wide, fused_keys, monkeypatch):
    monkeypatch.setattr(path, "HAS_AVX512", wide)
    q, k, v = inputs(69)
    ops.pooled_attention(q, k, v)
    ops.pooled_attention(q, k, v.clone().requires_grad_())
    ops.pooled_attention(*inputs(69, torch.float64))
    with torch.autocast("cpu"):
        ops.pooled_attention(q, k, v)
    assert fused_keys == [80 if wide else 69, 69, 69, 69]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_nothing_to_attend_to_or_from(impl):
    q, k, v = inputs(4)
    for empty in (k[:, :0], k.unflatten(1, [2, 2])[:, :, :0]):
        with pytest.raises(ValueError, match="expected at least one key"):
            ops.pooled_attention(q, empty, empty, impl=impl)
    with pytest.raises(ValueError, match="expected a map of at least 1 x 1 pixels"):
        ops.pooled_attention(q[:, :0], k, v, impl=impl)
