"""Where algorithms must be deterministic, no operator runs whose gradient torch refuses on GPUs, as it has no order."""

import pytest
import torch
import torch.nn.functional as F

import zoo.blocks.resize
import zoo.litv2
from builds import small
from flags import deterministic
from ops.dispatch import ordered
from zoo.blocks import bicubic
from zoo.blocks.resize import by_matmuls
from zoo.litv2 import sample_2x2


@pytest.fixture
def strict():
    with deterministic():
        yield


@pytest.fixture
def unordered(monkeypatch):
    """Fails where interpolation or torchvision's deformable convolution would need a gradient."""
    interpolate = F.interpolate

    def checked(x, *args, mode, **kwargs):
        assert mode == "nearest" or not x.requires_grad, f"the gradient of {mode} interpolation is refused"
        return interpolate(x, *args, mode=mode, **kwargs)

    monkeypatch.setattr(F, "interpolate", checked)
    monkeypatch.setattr(zoo.litv2, "deform_conv2d", lambda *_: pytest.fail("its gradient is refused"))


@pytest.mark.parametrize("size", [(7, 7), (13, 4), (3, 11), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bicubic_by_matmuls(size, dtype):
    x = torch.randn(2, 3, 5, 9, dtype=dtype, requires_grad=True)
    found, exact = by_matmuls(x, size), F.interpolate(x.double(), size, mode="bicubic", align_corners=False)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(found, exact.to(dtype), **close)
    probe = torch.randn_like(exact)
    one, other = (torch.autograd.grad(y, x, probe.to(y.dtype))[0] for y in (found, exact))
    torch.testing.assert_close(one, other, **(close or {"rtol": 0.05, "atol": 0.05}))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(by_matmuls(x, size), found)


def test_cpus_have_an_order(strict):
    x = torch.randn(1, 2, 5, 5)
    assert not ordered(x) and ordered(x.to("meta"))
    assert torch.equal(bicubic(x, (3, 4)), F.interpolate(x, (3, 4), mode="bicubic"))


@pytest.mark.parametrize("name", ["litv2_s", "gcvit_s", "sgformer_b"])
def test_models_train_at_any_size(strict, unordered, name):
    """On a device that is no CPU, though it computes nothing."""
    with torch.device("meta"):
        model = small(name, img_size=64)
        out = model(torch.randn(1, 3, 96, 130))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_deformable_convolutions_are_the_same(monkeypatch):
    torch.manual_seed(0)
    given = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 7, 8), (2, 8, 3, 4), (4, 3, 2, 2), (4,))]
    exact = sample_2x2(*given)
    monkeypatch.setattr(zoo.litv2, "ordered", lambda x: True)
    found = sample_2x2(*given)
    torch.testing.assert_close(found, exact)
    probe = torch.randn_like(exact)
    torch.testing.assert_close(torch.autograd.grad(found, given, probe), torch.autograd.grad(exact, given, probe))
