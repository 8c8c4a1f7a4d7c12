"""The torch paths on CPUs: matmuls or fused attention, as the CPU multiplies the dtype."""

import importlib

import pytest
import torch

import ops
from ops import partition
from ops.check.bound import share
from ops.check.cases import packed, random

pooled = importlib.import_module("ops.pooled_attention")

# AVX-512, AMX, vectors of bfloat16 and no AMX; then, by dtype, of which numbers of keys matmuls are taken
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ANY = [FLOAT32, BFLOAT16, FLOAT16]
CPUS = {
    "AVX2": ((False, False, False), {FLOAT32: (9, 16, 49), BFLOAT16: (), FLOAT16: ()}),
    "AVX-512": ((True, False, False), {FLOAT32: (9, 16), BFLOAT16: (9, 16), FLOAT16: ()}),
    "Zen 4": ((True, False, True), {FLOAT32: (9, 16, 49, 121), BFLOAT16: (9, 16, 49, 121), FLOAT16: ()}),
    "AMX": ((True, True, False), {FLOAT32: (9, 16), BFLOAT16: (9, 16), FLOAT16: (9, 16)}),
}


def becomes(cpu, monkeypatch):
    for name, has in zip(("HAS_AVX512", "HAS_TILES", "HAS_BFLOAT16"), CPUS[cpu][0], strict=True):
        monkeypatch.setattr(partition, name, has)
        if hasattr(pooled, name):
            monkeypatch.setattr(pooled, name, has)


@pytest.mark.parametrize("dtype", ANY, ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_without_gradients(cpu, dtype, fused_keys, monkeypatch):
    becomes(cpu, monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for window in (3, 4, 7, 11):
        q, k, v = packed(2, window, 2 * window, 2, 8).to(dtype).unbind(3)
        bias = random(2, 2 * window - 1, 2 * window - 1).to(dtype)
        got = ops.window_attention(q, k, v, bias, window, impl="torch")
        want, eager = (
            ops.window_attention(*(t.to(d) for t in (q, k, v, bias)), window, impl="reference")
            for d in (torch.double, dtype)
        )
        assert share(want, eager, got) <= 1
    assert [n for n in (9, 16, 49, 121) if n not in fused_keys] == list(CPUS[cpu][1][dtype])


@pytest.mark.parametrize("dtype", ANY, ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_with_gradients(cpu, dtype, fused_keys, monkeypatch):
    """Fused attention has gradients in half precision that are slow, but not as slow as matmuls of single numbers."""
    becomes(cpu, monkeypatch)
    q, k, v = packed(1, 11, 11, 2, 8).to(dtype).unbind(3)
    q = q.clone().requires_grad_()
    for window in (7, 11):
        ops.window_attention(q, k, v, None, window, impl="torch").sum().backward()
    single = (dtype == FLOAT16 and cpu != "AMX") or (dtype == BFLOAT16 and cpu == "AVX2")
    assert (49 in fused_keys) == single and (121 in fused_keys) == (single or dtype == FLOAT32)


@pytest.mark.parametrize("dtype", ANY, ids=str)
def test_one_thread(dtype, fused_keys, monkeypatch):
    """A second thread helps matmuls more, in float32 of any CPU."""
    becomes("Zen 4", monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for window in (4, 7):
        q, k, v = packed(1, window, window, 2, 8).to(dtype).unbind(3)
        ops.window_attention(q, k, v, None, window, impl="torch")
    assert fused_keys == {FLOAT32: [49], BFLOAT16: [], FLOAT16: [16, 49]}[dtype]


@pytest.mark.parametrize("dtype", ANY, ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_pooled(cpu, dtype, fused_keys, monkeypatch):
    """Logits that do not fit in the cache are never made whole, nor those of a large set of keys."""
    becomes(cpu, monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    q, (k, v) = random(2, 6, 7, 2, 8).to(dtype), random(2, 65, 2, 2, 8).to(dtype).unbind(2)
    got = ops.pooled_attention(q, k[:, :49], v[:, :49])
    few = not fused_keys
    assert few == (49 in CPUS[cpu][1][dtype])
    want, eager = (
        ops.pooled_attention(*(t.to(d) for t in (q, k[:, :49], v[:, :49])), impl="reference")
        for d in (torch.double, dtype)
    )
    assert share(want, eager, got) <= 1
    fused_keys.clear()
    ops.pooled_attention(q, k, v)
    monkeypatch.setattr(pooled, "CACHED", 4 * 2 * 2 * 6 * 7 * 49 - 1)
    ops.pooled_attention(q, k[:, :49], v[:, :49])
    assert len(fused_keys) == 2
