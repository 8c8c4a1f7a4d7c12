"""What trainers ask a segmenter and a detector, as they ask any model of timm's."""

import pytest
from timm.optim import param_groups_layer_decay

from zoo.heads import detector, segmenter

SMALL = {"dims": (32, 64, 64, 64), "depths": (1, 2, 1, 1)}


def scales(model):
    """The factor of each parameter's learning rate where every layer learns at half the rate of the next."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("make", [segmenter, detector])
def test_layers_of_our_backbones(make):
    """The stem, five blocks, and at the whole rate what stands behind them; downsamplers and norms go with blocks."""
    model = make("nat_m", 3, channels=16, **SMALL)
    found = scales(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    inner = "backbone.model."
    order = ["stem.", "stages.0.blocks.0.", "stages.1.blocks.0.", "stages.1.blocks.1.", "stages.2.", "stages.3."]
    for number, prefix in enumerate(order):
        part = {name: scale for name, scale in found.items() if name.startswith(inner + prefix)}
        assert part and set(part.values()) == {0.5 ** (6 - number)}, prefix
    assert found[f"{inner}stages.1.downsample.reduction.weight"] == 0.5**4
    assert found[f"{inner}feature_norms.3.weight"] == 0.5
    assert {scale for name, scale in found.items() if not name.startswith("backbone.")} == {1.0}


@pytest.mark.parametrize("make", [segmenter, detector])
def test_layers_of_timms_features(make):
    found = scales(make("resnet18", 3, channels=16))
    assert (
        found["backbone.conv1.weight"]
        < found["backbone.layer1.0.conv1.weight"]
        < found["backbone.layer4.1.conv2.weight"]
    )
    assert {scale for name, scale in found.items() if not name.startswith("backbone.")} == {1.0}
    assert found["backbone.layer4.1.conv2.weight"] == 0.5


def test_coarse_layers_are_stages():
    matcher = detector("nat_m", 3, channels=16, **SMALL).group_matcher(coarse=True)
    assert matcher == {"stem": r"backbone\.model\.(?:stem)", "blocks": r"backbone\.model\.(?:stages\.(\d+))"}
