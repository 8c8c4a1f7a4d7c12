"""For all tests of ops: uninitialised memory is full of NaN, so that nothing unwritten goes unnoticed."""

import importlib
import os

import pytest
import torch
from torch.nn import functional as F

# torch remembers which functions `with torch.device(...)` acts on when it first asks: before they are patched, then
with torch.device("meta"):
    torch.empty(0)

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted

    interpreted.lighten()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point():
                out.detach().fill_(float("nan"))
            return out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", poisoned(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv("ZOO_ATTENTION", raising=False)


@pytest.fixture
def marked_reference(monkeypatch):
    """Window attention whose reference answers by one too much: not every processor tells the two apart by rounding."""
    reference = importlib.import_module("ops.window_attention.reference")
    attend = reference.attend
    monkeypatch.setattr(reference, "attend", lambda *args: attend(*args) + 1)


@pytest.fixture
def fused_keys(monkeypatch):
    """How many keys each call of PyTorch's fused attention got."""
    counts, attend = [], F.scaled_dot_product_attention

    def noted(q, k, *rest, **options):
        counts.append(k.shape[2])
        return attend(q, k, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return counts


@pytest.fixture(params=[28.0, 30.0, 32.0])
def far(request):
    """A map whose middle cell has a mean that no pixel is near to: in float16 that token's affinities add up to 8e-6,
    1e-6 and nothing."""
    x, direction = torch.zeros(1, 8, 24, 16), torch.zeros(16)
    direction[0] = request.param
    x[:, :, :8] = x[:, :, 16:] = direction
    x[:, ::2, 8:16], x[:, 1::2, 8:16] = 1.02 * direction, -0.88 * direction
    return x.half()
