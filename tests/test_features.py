"""timm's features_only and tracers: what their users do with every backbone."""

import pytest
import timm
import torch
from timm.models import FeatureListNet

import zoo.show
from families import SMALL
from test_models import small, trained
from zoo.heads import segmenter


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


@pytest.mark.parametrize("kind", ["hook", "fx"])
def test_norms_of_features_come_from_the_getter(kind):
    with pytest.raises(ValueError, match=rf"feature_cls is '{kind}', which sees features before .*: expected 'getter'"):
        small("dinat_b", features_only=True, feature_norms=True, feature_cls=kind)
    with pytest.raises(ValueError, match="before their norms"):
        segmenter("dinat_b", 5, channels=16, feature_cls=kind, **SMALL["dinat_b"])


def test_hooked_models_are_loaded_and_trained_as_others(tmp_path):
    """The whole model is in the wrapper; in a graph it is not, and the error says what to do instead."""
    source, hooked, graph = (
        small("litv2_s", features_only=True, feature_cls=kind) for kind in ("getter", "hook", "fx")
    )
    torch.save(trained(source).model.state_dict(), tmp_path / "weights.pth")
    zoo.load_checkpoint(hooked, tmp_path / "weights.pth")
    x = torch.randn(1, 3, 64, 64)
    for want, found in zip(source(x), hooked.eval()(x), strict=True):
        torch.testing.assert_close(found.permute(0, 3, 1, 2), want)
    with pytest.raises(zoo.CheckpointError, match=r"A graph \(feature_cls='fx'\) takes weights as it is built: "):
        zoo.load_checkpoint(graph, tmp_path / "weights.pth")
    assert zoo.show.names(hooked) == zoo.show.names(source)
    model = segmenter(hooked, 5, channels=16)
    named = dict(model.named_parameters())
    assert model.lr_scales() and model.lr_scales().keys() <= named.keys()
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in hooked["body"].stages)
    with pytest.raises(ValueError, match="FeatureGraphNet has no gradient checkpointing"):
        segmenter(graph, 5, channels=16).set_grad_checkpointing()


def test_one_image_is_no_batch():
    model, image = small("davit_t", features_only=True, scriptable=True).model.eval(), torch.randn(3, 32, 32)
    says = r"images are torch\.Size\(\[3, 32, 32\]\): expected \(B, in_chans, H, W\)"
    for call in (model, model.forward_intermediates, torch.fx.symbolic_trace(model)):
        with pytest.raises(ValueError, match=says):
            call(image)
    with pytest.raises(torch.jit.Error, match=r"expected \(B, in_chans, H, W\)"):
        torch.jit.script(model)(image)
