"""What no model can be built of or asked, each refused in words."""

import pytest
import timm
import torch

from builds import bare, every_small, map_side, small
from families import FOUR_STAGES, ISOTROPIC, MOST_STAGES, PER_STAGE, SMALL


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"img_size": 0}, "img_size is 0: expected pixels a side"),
        ({"img_size": (224,)}, r"img_size is \(224,\): expected pixels a side"),
        ({"in_chans": 0}, "in_chans is 0: expected the number of channels of an image, 1 or more"),
        ({"in_chans": 2.0}, "in_chans is 2.0: expected the number of channels of an image, 1 or more"),
        ({"in_chans": -1}, "in_chans is -1: expected the number of channels of an image, 1 or more"),
        ({"num_classes": -1}, "num_classes is -1: expected the number of classes"),
        ({"num_classes": 10.0}, "num_classes is 10.0: expected the number of classes"),
        ({"num_classes": float("nan")}, "num_classes is nan: expected the number of classes"),
    ],
)
@pytest.mark.parametrize("make", [small, bare])
@every_small
def test_images_and_classes_that_there_are_not(name, make, given, says):
    with pytest.raises(ValueError, match=says):
        make(name, **given)


@pytest.mark.parametrize("key", ["attn_drop_rate", "proj_drop_rate", "norm_layer", "act_layer"])
@every_small
def test_arguments_of_timm_s_models_that_these_do_not_have(name, key):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
        small(name, **{key: 0.1})


@pytest.mark.parametrize("dim", [16, 112])  # no head of 32 channels; three that are not as wide as each other
@pytest.mark.parametrize("name", ["davit_t", "dinats_t", "maxvit_t", "nat_m"])
def test_widths_that_give_no_heads(name, dim):
    with pytest.raises(ValueError, match=f"dim {dim} does not divide into {dim // 32} heads"):
        timm.create_model(name, dims=(dim, 128, 256, 512))


@pytest.mark.parametrize(
    "name,given,says",
    [
        ("maxvit_t", {"window_size": 0}, "window is 0: expected at least 1 token a side"),
        ("maxvit_t", {"window_size": (7,)}, r"window is \(7,\): expected at least 1 token a side"),
        ("maxvit_t", {"grid_size": (7, 0)}, r"window is \(7, 0\): expected at least 1 token a side"),
        ("maxvit_t", {"partition_ratio": 0}, "partition_ratio is 0: expected pixels per token of a window, 1 or more"),
        ("gcvit_s", {"window_size": -1}, "window is -1: expected at least 1 token a side"),
        ("gcvit_s", {"window_size": 7.0}, "window is 7.0: expected at least 1 token a side"),
        ("davit_t", {"window_size": 0}, "window is 0: expected at least 1 token a side"),
        ("dinat_b", {"window_size": 6}, "window is 6, dilation is 1: expected an odd window and a dilation of 1"),
        ("dinat_iso_s", {"window_size": (7, 7)}, r"window is \(7, 7\), dilation is 1: expected an odd window"),
        ("dinats_t", {"dilations": 0}, "window is 7, dilation is 0: expected an odd window and a dilation of 1"),
        ("dinat_b", {"dilations": [1, 2, 1, 2]}, r"dilations is \[1, 2, 1, 2\]: expected a list per stage"),
        ("dinat_b", {"dims": (32, 64), "depths": (1, 1)}, "for 4 stages: the model has 2"),
        ("dinat_iso_s", {"dilations": ()}, "dilations is empty: expected one or more numbers"),
        ("litv2_s", {"alpha": 2}, "alpha is 2: expected a share of the heads, from 0 to 1"),
        (
            "litv2_s",
            {"windows": (0, 0, -2, 1)},
            r"windows is \(0, 0, -2, 1\): expected pixels a side of each stage, or 0",
        ),
        ("litv2_s", {"windows": (0, 0, (2, 2), 1)}, "expected pixels a side of each stage, or 0"),
        ("litv2_s", {"heads": (1, 2, 0, 4)}, "dim 128 does not divide into 0 heads"),
        ("litv2_s", {"heads": (1, 2, 3, 4), "dims": (32, 64, 32, 128)}, "dim 32 does not divide into 3 heads"),
        ("biformer_t", {"heads": (0, 2, 2, 2)}, "dim 32 does not divide into 0 heads"),
        ("biformer_t", {"heads": (3, 2, 2, 2)}, "dim 32 does not divide into 3 heads"),
        ("stvit_b", {"layer_scale_stages": (7,)}, r"stages is \(7,\): expected numbers of stages, from 0 to 3"),
        ("stvit_b", {"layer_scale_stages": 2}, r"stages is 2: expected numbers of stages, from 0 to 3"),
        ("stvit_b", {"layer_scale_stages": (2, -1)}, r"stages is \(2, -1\): expected numbers of stages, from 0 to 3"),
        ("stvit_b", {"heads": (-1, 1, 2, 2)}, "dim 32 does not divide into -1 heads"),
        ("stvit_b", {"heads": (1, 5, 2, 2)}, "dim 32 does not divide into 5 heads"),
        ("sgformer_b", {"heads": (0, 2, 4, 2)}, "dim is 32, heads 0: expected an even number of heads"),
        ("sgformer_b", {"heads": (1, 2, 2, 2)}, "dim is 32, heads 1: expected an even number of heads"),
        ("sgformer_b", {"heads": (3, 2, 2, 2)}, "dim is 32, heads 3: expected an even number of heads"),
        ("sgformer_b", {"heads": (6, 2, 2, 2)}, "dim is 32, heads 6: expected an even number of heads"),
        ("sgformer_b", {"dims": (32,) * 5, "depths": (1,) * 5, "heads": (2,) * 5}, "expected at most 4 stages"),
        ("gcvit_s", {"mlp_ratio": "3"}, "mlp_ratio is '3': expected hidden units of an MLP per channel"),
        ("dinat_b", {"mlp_ratio": float("inf")}, "mlp_ratio is inf: expected hidden units of an MLP per channel"),
        ("biformer_t", {"mlp_ratio": float("nan")}, "mlp_ratio is nan: expected hidden units of an MLP per channel"),
        ("gcvit_s", {"layer_scale": "a"}, "layer_scale is 'a': expected the first value of the factors"),
        ("maxvit_t", {"stem_dim": 0}, "stem_dim is 0: expected channels of the stem, 1 or more"),
        ("maxvit_t", {"stem_dim": "8"}, "stem_dim is '8': expected channels of the stem, 1 or more"),
        ("maxvit_t", {"bn_momentum": 7}, "bn_momentum is 7: expected a share of the running statistics, from 0 to 1"),
        ("maxvit_t", {"bn_momentum": (0.1,)}, r"bn_momentum is \(0.1,\): expected a share of the running statistics"),
        ("gcvit_s", {"mlp_ratio": -1}, "an MLP for 32 channels has -32 hidden units: expected 1 or more"),
    ],
)
def test_arguments_that_fit_no_layer(name, given, says):
    with pytest.raises(ValueError, match=says):
        small(name, **given)


@pytest.mark.parametrize("name", sorted(SMALL.keys() - ISOTROPIC))
def test_stages_of_different_numbers(name):
    says = "a number for each of 4 stages" if name in FOUR_STAGES else "one number per stage in each"
    with pytest.raises(ValueError, match=rf"depths is \(1, 1\).*: expected {says}"):
        small(name, depths=(1, 1))


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@every_small
def test_other_numbers_of_stages(name, stages):
    given = {key: (*value, value[-1])[:stages] for key, value in SMALL[name].items() if isinstance(value, tuple)}
    given |= PER_STAGE.get(name, lambda stages: {})(stages)
    if stages > MOST_STAGES.get(name, stages) or name in FOUR_STAGES:
        says = "a number for each of" if name in FOUR_STAGES else "at most"
        with pytest.raises(ValueError, match=f"expected {says} 4 stages"):
            small(name, **given)
        return
    x = torch.randn(1, 3, 64, 96)
    assert small(name, **given).eval()(x).shape == (1, 7)
    net = small(name, features_only=True, **given).eval()
    assert net.feature_info.reduction() == [16 if name in ISOTROPIC else 4 * 2**i for i in range(stages)]
    sides = [tuple(map_side(name, side, i) for side in x.shape[2:]) for i in range(stages)]
    assert [tuple(maps.shape[2:]) for maps in net(x)] == sides


@pytest.mark.parametrize("stages", [4, 3, 2, 1])
@every_small
def test_images_that_are_too_small(name, stages):
    """One pixel less than leaves all maps a pixel is refused in words."""
    model = small(name).eval()
    model.prune_intermediate_layers([stages - 1])
    least = {
        "biformer_stl": 2 ** (stages + 1),
        "biformer_stl_nchw": 2 ** (stages + 1),
        "litv2_s": 2 ** (stages + 1) - 3,
        "sgformer_b": 29,
    }.get(name, 1)
    assert model.min_img_size == least
    with torch.no_grad():
        assert model(torch.randn(1, 3, least, least)).isfinite().all()
    if least > 1:
        for size in ((least - 1, 64), (64, least - 1)):
            image = torch.randn(1, 3, *size)
            for call in (model, model.forward_intermediates, torch.fx.symbolic_trace(model)):
                with pytest.raises(ValueError, match=rf"images are .*: expected at least {least} pixels a side"):
                    call(image)
        model.min_img_size = 1
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            model(image)


@every_small
def test_wrong_channels_name_themselves(name):
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        small(name)(torch.randn(1, 4, 64, 64))
