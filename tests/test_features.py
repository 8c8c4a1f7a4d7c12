"""timm's features_only and tracers: what their users do with every backbone."""

import pytest
import timm
import torch
from timm.models import FeatureListNet

from families import SMALL
from test_models import small, trained


@pytest.mark.parametrize("name", ["davit_t", "stvit_b"])
def test_features_are_scripted(name):
    net = trained(small(name, features_only=True, feature_norms=True, scriptable=True, out_indices=(1, 3)))
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name,features", [("gcvit_s", False), ("litv2_s", False), ("davit_t", True)])
def test_a_trace_is_the_same_without_gradients(name, features):
    """By torch's own check, which runs without them."""
    model = trained(small(name, features_only=True) if features else small(name))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("kind", ["getter", "hook", "fx", "FX"])
def test_classes_of_features(kind):
    net = small("davit_t", features_only=True, feature_cls=kind)
    assert len(net(torch.randn(1, 3, 32, 32))) == 4


@pytest.mark.parametrize("kind", ["dict", "list", "lists", FeatureListNet])
def test_classes_that_find_no_features(kind):
    with pytest.raises(ValueError, match=r"feature_cls is .*: expected 'getter' \(the default\), 'hook' or 'fx'"):
        timm.create_model("davit_t", features_only=True, feature_cls=kind, **SMALL["davit_t"])


def test_one_image_is_no_batch():
    model, image = small("davit_t", features_only=True, scriptable=True).model.eval(), torch.randn(3, 32, 32)
    says = r"images are torch\.Size\(\[3, 32, 32\]\): expected \(B, in_chans, H, W\)"
    for call in (model, model.forward_intermediates, torch.fx.symbolic_trace(model)):
        with pytest.raises(ValueError, match=says):
            call(image)
    with pytest.raises(torch.jit.Error, match=r"expected \(B, in_chans, H, W\)"):
        torch.jit.script(model)(image)
