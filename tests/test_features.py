"""timm's features_only and tracers: what their users do with every backbone."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import FeatureHookNet, FeatureListNet, create_model
from timm.models._features import FeatureGetterNet
from torchvision.models.feature_extraction import create_feature_extractor

import zoo.show
from builds import every_small, map_side, small, trained
from families import ISOTROPIC, SMALL
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
    net, usual = small("davit_t", features_only=True, feature_cls=kind), small("davit_t", features_only=True)
    x = torch.randn(1, 3, 32, 32)
    channels_last = net.output_fmt.value == "NHWC"
    found = [maps.permute(0, 3, 1, 2) if channels_last else maps for maps in net.eval()(x)]
    torch.testing.assert_close(found, usual.eval()(x))
    assert len(found) == 4


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


@pytest.mark.parametrize("kind", ["getter", "hook", FeatureGetterNet, FeatureHookNet])
def test_blocks_are_computed_again_for_features(kind):
    """Checkpointing reaches the model in the wrapper, and changes no gradient."""
    net, x = trained(small("davit_t", features_only=True, feature_cls=kind)), torch.randn(1, 3, 64, 64)
    calls, gradients = [], []
    next(net.children()).stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True, False):
        net.set_grad_checkpointing(enable)
        loss = sum(feature.square().sum() for feature in net(x))
        read = [parameter for name, parameter in net.named_parameters() if ".head." not in name]
        gradients.append(torch.autograd.grad(loss, read))
        assert len(calls) == (2 if enable else 1)
        calls.clear()
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_features_checkpoints_its_own_model(copied):
    net = small("davit_t", features_only=True)
    copied(net).set_grad_checkpointing()
    assert not any(stage.grad_checkpointing for stage in net.model.stages)


def test_one_image_is_no_batch():
    model, image = small("davit_t", features_only=True, scriptable=True).model.eval(), torch.randn(3, 32, 32)
    says = r"images are torch\.Size\(\[3, 32, 32\]\): expected \(B, in_chans, H, W\)"
    for call in (model, model.forward_intermediates, torch.fx.symbolic_trace(model)):
        with pytest.raises(ValueError, match=says):
            call(image)
    with pytest.raises(torch.jit.Error, match=r"expected \(B, in_chans, H, W\)"):
        torch.jit.script(model)(image)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("gcvit_xxtiny", "gcvit_xxt"), ("davit_tiny", "davit_t"), ("maxvit_tiny_tf_224", "maxvit_t")]
)
def test_features_are_timm_s(theirs, ours):
    """With the weights of a twin in timm: features and, without a classifier and pooling, outputs are the same."""
    torch.manual_seed(0)
    twin, x = trained(create_model(theirs)), torch.rand(1, 3, 224, 224)
    model = create_model(ours, pretrained=True, pretrained_cfg_overlay={"state_dict": twin.state_dict()}).eval()
    with torch.no_grad():
        features = twin.forward_features(x)
        torch.testing.assert_close(model.forward_features(x), features, rtol=1e-3, atol=1e-3 * features.std().item())
        twin.reset_classifier(0, "")
        model.reset_classifier(0, "")
        want = twin(x)
        torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3 * want.std().item())


@every_small
@pytest.mark.parametrize("kind", ["fx", "hook"])
def test_features_are_in_the_format_that_they_say(name, kind):
    model = small(name, features_only=True, feature_cls=kind, out_indices=(1, 2)).eval()
    last = str(model.output_fmt.value).index("C")
    channels = [feature.shape[last] for feature in model(torch.randn(1, 3, 64, 96))]
    assert channels == model.feature_info.channels()


@every_small
def test_torch_fx_traces(name):
    """And torchvision's way to take features out of a model, for images of any size."""
    model, x = trained(small(name)), torch.randn(2, 3, 70, 97)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    extract = create_feature_extractor(model, {"stages.1": "map", "head.fc": "logits"})
    found = extract(x)
    want = model.forward_intermediates(x, [1], output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(found, {"map": want[0], "logits": model(x)})


@every_small
def test_a_graph_is_scripted(name):
    model, x = trained(small(name)), torch.randn(2, 3, 70, 97)
    torch.testing.assert_close(torch.jit.script(torch.fx.symbolic_trace(model))(x), model(x))


@every_small
def test_gradients_through_a_graph(name):
    model, x = small(name).train(), torch.randn(2, 3, 64, 96)
    named = dict(model.named_parameters())
    want, found = (
        dict(zip(named, torch.autograd.grad(one(x).square().sum(), list(named.values())), strict=True))
        for one in (model, torch.fx.symbolic_trace(model))
    )
    torch.testing.assert_close(found, want)


@every_small
def test_layers_of_a_graph_may_be_hooked_or_replaced(name):
    """Also where the graph calls them for the zeros that pad windows."""
    model, x = trained(small(name)), torch.randn(1, 3, 80, 80)
    graph = torch.fx.symbolic_trace(model)
    for one in (model, graph):
        for path, layer in one.named_modules():
            if path.endswith(("qkv", "kv")):
                layer.register_forward_hook(lambda _, given, out: out / 2)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("name", ["davit_t", "gcvit_s", "dinat_b", "litv2_s"])
def test_a_projection_in_a_graph_is_that_of_the_map(name):
    """torch.fx names the first call of a layer after it; zeros are projected in another."""
    model = trained(small(name))
    path = next(path for path, _ in model.named_modules() if path.endswith("qkv"))
    found = create_feature_extractor(model, {path: "tokens"})(torch.randn(1, 3, 80, 80))["tokens"]
    assert found.shape[:3].numel() > 1


@every_small
@pytest.mark.parametrize("size", [(230, 250), (97, 33)])
def test_features(name, size):
    net = small(name, features_only=True, feature_norms=True, out_indices=(1, 3))
    maps = net(torch.randn(2, 3, *size))
    dims = [info["num_chs"] for info in small(name).feature_info]
    assert net.feature_info.channels() == [dims[1], dims[3]]
    assert net.feature_info.reduction() == ([16, 16] if name in ISOTROPIC else [8, 32])
    for feature, halvings in zip(maps, (1, 3), strict=True):
        assert feature.shape[2:] == tuple(map_side(name, side, halvings) for side in size)
        # a LayerNorm with fresh weights leaves mean 0 and variance 1 over the channels
        assert feature.mean(1).abs().max() < 1e-5
    sum(feature.square().sum() for feature in maps).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []


@every_small
def test_intermediates(name):
    model = trained(small(name))
    x = torch.randn(2, 3, 96, 96)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(final, model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0])
    early, (second,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    torch.testing.assert_close(early, second)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    torch.testing.assert_close(last_two, maps[2:])
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(first[0], maps[0].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
