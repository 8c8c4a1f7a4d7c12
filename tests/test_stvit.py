"""What is STViT's alone: super tokens and what their gradient leaves out, its wide head, its factors."""

import pytest
import torch
from timm.models import create_model
from torch import nn

from builds import small, trained
from zoo import table
from zoo.stvit import VARIANTS, SuperTokenAttention

GFLOPS = {"stvit_s": 4.350, "stvit_b": 9.842, "stvit_l": 15.561}


def attention(differentiable=False, cell=(3, 3)):
    torch.manual_seed(0)
    return SuperTokenAttention(16, 2, cell, 1, differentiable).double()


def test_gradient_of_the_association_is_an_option():
    """The same map either way; finite differences agree where the association takes part, and only there."""
    x = torch.randn(1, 7, 8, 16, dtype=torch.float64, requires_grad=True)
    constant, learned = attention(), attention(differentiable=True)
    assert torch.equal(constant(x), learned(x))
    assert torch.autograd.gradcheck(learned, (x,), fast_mode=True)
    gradients = [torch.autograd.grad(module(x).square().sum(), x)[0] for module in (constant, learned)]
    assert not torch.allclose(*gradients, rtol=1e-3)
    for differentiable in (False, True):
        model = small("stvit_b", differentiable=differentiable)
        flags = {m.differentiable for m in model.modules() if isinstance(m, SuperTokenAttention)}
        assert flags == {differentiable}


def test_cells_of_one_pixel_are_plain_attention():
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64)
    module = attention(cell=(1, 1))
    b, h, w, c = x.shape
    # q, k and v of a head lie together
    q, k, v = module.refine.qkv(x).view(b, h * w, 2, 3, 8).permute(3, 0, 2, 1, 4)
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)
    torch.testing.assert_close(module(x), module.refine.proj(out))


def test_zeros_fill_the_cells():
    """As published: these pixels share themselves out, and count in the averages."""
    x = torch.randn(2, 7, 8, 16, dtype=torch.float64)
    filled = torch.zeros(2, 9, 9, 16, dtype=torch.float64)
    filled[:, :7, :8] = x
    module = attention()
    torch.testing.assert_close(module(x), module(filled)[:, :7, :8], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", VARIANTS)
def test_structure(name):
    model = create_model(name, device="meta")
    cells = [{m.cell for m in stage.modules() if isinstance(m, SuperTokenAttention)} for stage in model.stages]
    assert cells == [{(8, 8)}, {(4, 4)}, {(1, 1)}, {(1, 1)}]
    scaled = [any(key.endswith("gamma") for key in stage.state_dict()) for stage in model.stages]
    assert scaled == [False, False, name != "stvit_s", name != "stvit_s"]
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert table.gflops(name) == pytest.approx(GFLOPS[name], rel=0.005)


def test_wide_head():
    """The layer before the pooling belongs to the classifier: features have the width of the last stage."""
    model = trained(small("stvit_b"))
    x = torch.randn(2, 3, 64, 64)
    assert model.forward_features(x).shape == (2, 64, 2, 2) and model.num_features == 64
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 1024)
    maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    model.prune_intermediate_layers(3, prune_norm=False)
    assert not any(key.startswith("head.") for key in model.state_dict())


def test_cells_and_rounds():
    x = torch.randn(1, 3, 96, 128)
    usual = trained(small("stvit_b")).eval()
    for change, cells, rounds in (
        ({"cells": (16, 8, 1, 1)}, [(16, 16), (8, 8), (1, 1), (1, 1)], 1),
        ({"cells": ((4, 8), 4, 2, 1)}, [(4, 8), (4, 4), (2, 2), (1, 1)], 1),
        ({"iterations": 2}, [(8, 8), (4, 4), (1, 1), (1, 1)], 2),
    ):
        other = small("stvit_b", **change).eval()
        layers = [[m for m in stage.modules() if isinstance(m, SuperTokenAttention)] for stage in other.stages]
        assert [{(m.cell, m.iterations) for m in stage} for stage in layers] == [{(cell, rounds)} for cell in cells]
        other.load_state_dict(usual.state_dict())
        assert not torch.allclose(other(x), usual(x), rtol=1e-4)


def test_first_values():
    """torch's own, uniform between bounds that go by what enters a layer, but for the classifier."""
    model = small("stvit_b", num_classes=1000)
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m is not model.head.fc:
            bound = m.weight[0].numel() ** -0.5
            assert 0.98 * bound < m.weight.abs().max() <= bound, name
            assert 0.7 * bound < m.bias.abs().max() <= bound, name
            assert m.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.01) and not model.head.fc.bias.any()


def test_first_values_of_the_layer_scale():
    gammas = [module.gamma for module in small("stvit_b").modules() if hasattr(module, "gamma")]
    assert gammas and all(torch.equal(gamma, torch.full_like(gamma, 1e-6)) for gamma in gammas)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cells": (0, 4, 1, 1)}, "cell is 0: expected at least 1 pixel a side"),
        ({"cells": ((8, -1), 4, 1, 1)}, r"cell is \(8, -1\): expected at least 1 pixel a side"),
        ({"iterations": 0}, "iterations is 0: expected rounds of averaging, 1 or more"),
        ({"iterations": 1.5}, "iterations is 1.5: expected rounds of averaging, 1 or more"),
    ],
)
def test_cells_and_rounds_that_there_are_not(given, says):
    with pytest.raises(ValueError, match=says):
        create_model("stvit_s", device="meta", **given)
