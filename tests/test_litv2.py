"""What is LITv2's alone: offsets, the split of its heads, maps that round down."""

import pytest
import torch
from timm.models import create_model
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

import ops
import zoo
from builds import small, trained
from zoo import table
from zoo.litv2 import VARIANTS, HighFrequencies, LowFrequencies, interpolate, resample, sample_2x2


@pytest.mark.parametrize("far", [0, 3, 1e20])
@pytest.mark.parametrize("size", [(8, 10), (7, 9), (2, 3)])
@pytest.mark.parametrize("taps", [interpolate, resample])
def test_sampled_map_is_a_deformable_convolution(taps, size, far):
    """What CPUs and ONNX get, and its gradients: also where offsets lead over the border."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    offset = far * torch.randn(2, 8, size[0] // 2, size[1] // 2, dtype=torch.float64)
    offset.requires_grad_()
    weight, bias = torch.randn(6, 5, 2, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = deform_conv2d(x, offset, weight, bias, stride=2)
    got = torch.nn.functional.conv2d(taps(x, offset), weight, bias, 2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if taps is interpolate:
        torch.testing.assert_close(sample_2x2(x, offset, weight, bias), got, rtol=0, atol=0)
        torch.testing.assert_close(grads(got, x, offset), grads(expected, x, offset), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_second_derivatives(size):
    """By the reference: the map of the fast way, with derivatives of it and of its gradients."""
    torch.manual_seed(0)
    x, offset = torch.randn(2, 2, *size), 2 * torch.randn(2, 8, size[0] // 2, size[1] // 2)
    inputs = [t.double().requires_grad_() for t in (x, offset, torch.randn(3, 2, 2, 2), torch.randn(3))]
    expected = sample_2x2(*inputs)
    with ops.implementation("reference"):
        got = sample_2x2(*inputs)
        assert torch.autograd.gradcheck(sample_2x2, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(sample_2x2, inputs)
        wide = sample_2x2(*inputs).to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = sample_2x2(*(t.float() for t in inputs))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads(got, *inputs), grads(expected, *inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed, wide, rtol=1e-5, atol=1e-5)


def grads(out, *inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype), retain_graph=True)


def test_offsets_that_are_no_numbers():
    """They do not vanish in a loss that is finite, nor lead out of the map's memory."""
    offset = torch.full((1, 8, 4, 4), float("nan"))
    assert sample_2x2(torch.randn(1, 3, 8, 8), offset, torch.randn(2, 3, 2, 2), None).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_keep_their_precision(dtype):
    """In reduced precision, and under autocast, taps are sampled as in float32."""
    torch.manual_seed(0)
    inputs = (torch.randn(1, 4, 16, 16), torch.randn(1, 8, 8, 8), torch.randn(3, 4, 2, 2), torch.randn(3))
    rounded = [t.to(dtype) for t in inputs]
    expected = sample_2x2(*[t.float() for t in rounded])
    torch.testing.assert_close(expected, deform_conv2d(*[t.float() for t in rounded], stride=2))
    assert torch.equal(sample_2x2(*rounded), expected.to(dtype))
    with torch.autocast("cpu", dtype):
        mixed = sample_2x2(*rounded[:2], *[t.float() for t in rounded[2:]])
    assert mixed.dtype == torch.float32 and torch.equal(mixed, expected)


# heads for low frequencies in the third stage
LOW = {"litv2_s": 10, "litv2_m": 10, "litv2_b": 14, "litv2_s_a00": 0, "litv2_s_a02": 2, "litv2_s_a04": 4}
LOW |= {"litv2_s_a05": 6, "litv2_s_a07": 8, "litv2_s_a09": 10, "litv2_s_a10": 12}


@pytest.mark.parametrize("name", VARIANTS)
def test_heads(name):
    heads = LOW[name]
    model = create_model(name, device="meta")
    total = zoo.variants()[name]["heads"]
    for block in model.stages[2].blocks:
        low = [m.heads for m in block.modules() if isinstance(m, LowFrequencies)]
        high = [m.heads for m in block.modules() if isinstance(m, HighFrequencies)]
        assert (low, high) == ([heads] * (heads > 0), [total[2] - heads] * (heads < total[2]))
    # windows of one pixel have no high frequencies
    assert [m.heads for m in model.stages[3].modules() if isinstance(m, LowFrequencies)] == [total[3]] * 2
    assert not any(isinstance(m, HighFrequencies) for m in model.stages[3].modules())
    assert not any(hasattr(block, "attn") for i in (0, 1) for block in model.stages[i].blocks)


@pytest.mark.parametrize(("name", "cost"), [("litv2_s", 3.724), ("litv2_m", 7.463), ("litv2_b", 13.172)])
def test_cost_counts_the_deformable_convolutions(name, cost):
    assert table.gflops(name) == pytest.approx(cost, rel=1e-3)


def test_offset_weights_learn_slower():
    model = small("litv2_s")
    assert model.lr_scales() == {f"stages.{i}.downsample.offset.weight": 0.01 for i in (1, 2, 3)}
    # at first every tap is where an ordinary convolution has it
    merge = model.stages[1].downsample
    x = torch.randn(1, 8, 8, 32)
    with torch.no_grad():
        halved = F.conv2d(x.permute(0, 3, 1, 2), merge.conv.weight, merge.conv.bias, 2)
        plain = merge.act(merge.norm(halved)).permute(0, 2, 3, 1)
    torch.testing.assert_close(merge(x), plain)


def test_zeros_fill_the_map():
    """As published for dense prediction: both branches work on the normed map, filled with zeros to whole windows."""
    torch.manual_seed(0)
    x = torch.randn(1, 5, 7, 32, dtype=torch.float64)
    filled = torch.zeros(1, 6, 8, 32, dtype=torch.float64)
    filled[:, :5, :7] = x
    for kind in (HighFrequencies, LowFrequencies):
        branch = kind(32, 2, 16, 2).double()
        torch.testing.assert_close(branch(x), branch(filled)[:, :5, :7], rtol=0, atol=1e-14)


def test_odd_rows_are_dropped():
    model = trained(small("litv2_s", features_only=True))
    assert [tuple(f.shape[2:]) for f in model(torch.randn(1, 3, 250, 318))] == [(63, 80), (31, 40), (15, 20), (7, 10)]


def test_windows_of_four():
    """Those of the published detectors; the parameters are the same."""
    wide, usual = small("litv2_s", windows=(0, 0, 4, 1)), small("litv2_s")
    wide.load_state_dict(usual.state_dict())
    x = torch.randn(1, 3, 128, 128)
    assert not torch.allclose(wide.eval()(x), usual.eval()(x))
    assert {m.window for m in wide.stages[2].modules() if isinstance(m, HighFrequencies)} == {(4, 4)}
    assert {m.window for m in wide.stages[2].modules() if isinstance(m, LowFrequencies)} == {4}


@pytest.mark.parametrize("alpha", [1.5, -0.1, float("nan"), "0.9"])
def test_shares_of_heads_that_are_none(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha!r}: expected a share of the heads, from 0 to 1"):
        create_model("litv2_s", alpha=alpha, device="meta")
