"""What a user of timm expects of every model, and what this zoo adds: any image size."""

import pytest
import timm
import torch
from timm.layers import DropPath, get_channel_dim, get_spatial_dim
from timm.models import create_model, get_model_args, get_model_input_config
from torchvision.models.feature_extraction import create_feature_extractor

import ops
import zoo
from families import CROPPED, FOUR_STAGES, ISOTROPIC, MOST_STAGES, PER_STAGE, RESIZED, ROUNDED_DOWN, SMALL
from zoo.blocks import ConvPosition, WindowAttention, image_sides, init_fan_out, resize_table


def small(name, **kwargs):
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 7, **SMALL[name], **kwargs})


def trained(model):
    """Weights and statistics away from their first values, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


every_small = pytest.mark.parametrize("name", SMALL)


@pytest.mark.parametrize("name", zoo.variants())
def test_every_variant_builds(name):
    args = zoo.variants()[name]
    model = create_model(name, device="meta")
    assert next(model.parameters()).device.type == "meta"
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert cfg["input_size"] == (3, args["img_size"], args["img_size"])
    assert cfg["classifier"] + ".weight" in model.state_dict()
    assert cfg["first_conv"] + ".weight" in model.state_dict()


def test_variants_are_plain_data():
    for args in zoo.variants().values():
        for value in args.values():
            assert isinstance(value, (int, float, str, tuple))
    zoo.variants()["maxvit_t"]["depths"] = None
    assert zoo.variants()["maxvit_t"]["depths"] == (2, 2, 5, 2)


@every_small
@pytest.mark.parametrize("size", [(230, 250), (256, 320), (97, 33), (32, 32), (64, 224)])
def test_any_size(name, size):
    model = small(name).train()
    logits = model(torch.randn(3, 3, *size))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    one = model.eval()(torch.randn(1, 3, *size))
    assert one.isfinite().all()


@pytest.mark.slow
@every_small
def test_large_image(name):
    model = small(name)
    model(torch.randn(1, 3, 800, 1333)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_small
def test_reference(name):
    """The whole model on the specifications of its ops."""
    model = trained(small(name, dtype=torch.float64))
    x = torch.randn(2, 3, 70, 90, dtype=torch.float64)
    with ops.implementation("reference"):
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def map_side(name, side, halvings):
    """Pixels along a side of the map after a stem of stride 4 and so many halvings."""
    if name in ISOTROPIC:
        return -(-side // 16)
    if name in CROPPED:
        return side // 4 >> halvings
    side = -(-side // 4)
    return side >> halvings if name in ROUNDED_DOWN else -(-side >> halvings)


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
def test_configuration(name):
    """What timm's own test of default configurations checks."""
    model = small(name, num_classes=1000)
    cfg, x = model.default_cfg, torch.randn(1, *timm.data.resolve_model_data_config(model)["input_size"])
    features, axes = model.forward_features(x), get_spatial_dim(model.output_fmt)
    assert features.shape[get_channel_dim(model.output_fmt)] == model.num_features
    assert tuple(features.shape[axis] for axis in axes) == cfg["pool_size"]
    assert features.mean(axes).shape == (1, model.num_features)
    weights = model.state_dict()
    for layer in (cfg["first_conv"], cfg["classifier"]):
        assert f"{layer}.weight" in weights
    model.reset_classifier(0)
    assert model(x).shape == (1, model.head_hidden_size) and f"{cfg['classifier']}.weight" not in model.state_dict()


OTHER_SIZES = [
    release.name
    for release in zoo.RELEASES
    if release.loadable and release.tag and release.model in zoo.variants()
    and timm.get_pretrained_cfg(release.name).input_size[1] != zoo.variants()[release.model]["img_size"]
]  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_a_tag_of_another_size(name):
    """The model is for the images of its weights, and says so."""
    with torch.device("meta"):
        model, other = timm.create_model(name), timm.create_model(name, img_size=(64, 96))
    size = model.pretrained_cfg["input_size"]
    assert image_sides(model.img_size) == size[1:] and get_model_input_config(model)["input_size"] == size
    assert image_sides(other.img_size) == (64, 96)


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


@every_small
def test_head(name):
    model = trained(small(name))
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.forward_head(features))
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(hidden), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.head_hidden_size, *[64 // model.reduction] * 2)
    assert model.global_pool == ""
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3) and model.global_pool == "max"
    want = model(x)
    with pytest.raises(ValueError, match="global_pool is 'attention'"):
        model.reset_classifier(4, "attention")
    for count in (-1, 2.5, None):
        with pytest.raises(ValueError, match=f"num_classes is {count}: expected the number of classes"):
            model.reset_classifier(count)
    assert torch.equal(model(x), want) and model.num_classes == 3


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
@pytest.mark.parametrize("prune_head", [True, False])
def test_stages_are_cut(name, prune_head):
    """As timm's models: norm and head go with the last stage, and a new classifier fits the last one that is left."""
    model, x = trained(small(name)), torch.randn(2, 3, 64, 64)
    want = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    width = model.feature_info[1]["num_chs"]
    assert model.prune_intermediate_layers([1], prune_head=prune_head) == [1]
    assert not [key for key in model.state_dict() if key.startswith("head.")]
    assert model.num_features == model.head_hidden_size == width and model.num_classes == 0
    torch.testing.assert_close(model(x), want)
    model.reset_classifier(10, "avg")
    torch.testing.assert_close(model.forward_head(want, pre_logits=True), want.mean((2, 3)))
    assert model(x).shape == (2, 10) and model.num_classes == 10
    model(x).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@every_small
def test_a_head_is_cut_off(name):
    """All stages are kept: so is the norm before the head, until it is asked for, and a new classifier fits."""
    model, x = trained(small(name)), torch.randn(2, 3, 64, 64)
    width = model.feature_info[3]["num_chs"]
    want = model.forward_intermediates(x, [3], norm=True, intermediates_only=True)[0]
    model.prune_intermediate_layers([3])
    assert model.num_features == model.head_hidden_size == width
    torch.testing.assert_close(model(x), want)
    model.reset_classifier(10, "avg")
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), want.mean((2, 3)))
    model.prune_intermediate_layers([3], prune_norm=True)
    torch.testing.assert_close(model(x), model.forward_features(x))


@every_small
def test_a_norm_is_cut_off(name):
    """The head that is kept goes on fitting."""
    model = trained(small(name))
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_stages_are_cut_as_timm_cuts_them():
    ours, theirs = create_model("gcvit_xxt", num_classes=7), create_model("gcvit_xxtiny", num_classes=7)
    x = torch.randn(1, 3, 224, 224)  # the one size that timm's takes
    for indices, prune_norm, prune_head in (([0, 2], False, False), ([1], True, True)):
        for model in (ours, theirs):
            assert model.prune_intermediate_layers(indices, prune_norm, prune_head) == indices
        assert (ours.num_features, ours.head_hidden_size) == (theirs.num_features, theirs.head_hidden_size)
        assert ours(x).shape == theirs(x).shape
    for model in (ours, theirs):
        model.reset_classifier(10, "avg")
        assert model(x).shape == (1, 10)


@every_small
def test_reset_keeps_device_and_precision(name):
    model = small(name, dtype=torch.float64).eval()
    model.reset_classifier(5)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    model.reset_classifier(0)
    model.reset_classifier(5)
    assert model.head.fc.weight.dtype == torch.float64


@every_small
def test_the_same_size_leaves_parameters_where_they_are(name):
    model = small(name)
    before = dict(model.named_parameters())
    if hasattr(model, "set_input_size"):
        model.set_input_size(SMALL[name].get("img_size", 224))
    assert all(p is before[key] for key, p in model.named_parameters())


@pytest.mark.parametrize("name", RESIZED)
def test_a_frozen_model_stays_frozen_at_another_size(name):
    model = small(name).requires_grad_(False)
    before = list(model.parameters())
    model.set_input_size(256)
    after = list(model.parameters())
    assert any(p is not old for p, old in zip(after, before, strict=True)) and not any(p.requires_grad for p in after)


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, cases in RESIZED.items() for wrong in cases])
def test_a_size_that_is_refused_changes_nothing(name, wrong):
    model = small(name)
    tensors, x = model.state_dict(), torch.randn(1, 3, 80, 72)
    before = model.img_size, get_model_args(model), model.eval()(x)
    with pytest.raises(ValueError, match=r"is .*: expected"):
        model.set_input_size(**wrong)
    assert (model.img_size, get_model_args(model)) == before[:2] and torch.equal(model(x), before[2])
    assert all(tensor.data_ptr() == tensors[key].data_ptr() for key, tensor in model.state_dict().items())


def test_models_that_can_be_built_for_another_size():
    assert {name for name in SMALL if hasattr(small(name), "set_input_size")} == RESIZED.keys()


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
def test_checkpointing_gives_the_same_gradients(name):
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        # evaluation mode: the batch norms' running statistics are left alone when the forward runs again
        model = trained(small(name))
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


@every_small
def test_gradients_of_each_image(name):
    """Those that torch.func's vmap gives for all images at once are those of each image alone."""
    model = trained(small(name)).double()
    parameters, images = dict(model.named_parameters()), torch.randn(2, 3, 40, 72, dtype=torch.float64)

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, image.unsqueeze(0)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    loss(parameters, images[1]).backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(each[key][1], parameter.grad, rtol=1e-9, atol=1e-9)


def has_forward_derivative(name):
    """Whether PyTorch has one of all that a model does: in older versions not of SG-Former's group norms, whose maps
    have channels last.
    """
    if name.startswith("sgformer"):
        x = torch.ones(1, 4, 2, 2).to(memory_format=torch.channels_last)
        try:
            torch.func.jvp(torch.nn.GroupNorm(1, 4), (x,), (x,))
        except RuntimeError as error:
            assert "view size is not compatible" in str(error)
            return False
    return True


@every_small
def test_transforms_of_functions(name):
    """A Jacobian, and its product with a direction, are those of ordinary gradients."""
    model = trained(small(name, num_classes=2)).double()
    image, step = torch.randn(2, 1, 3, 40, 72, dtype=torch.float64)
    logits = model(image.requires_grad_())
    want = torch.stack([torch.autograd.grad(logit, image, retain_graph=True)[0] for logit in logits[0]])
    torch.testing.assert_close(torch.func.jacrev(model)(image)[0], want, rtol=1e-9, atol=1e-9)
    if has_forward_derivative(name):
        _, along = torch.func.jvp(model, (image,), (step,))
        torch.testing.assert_close(along[0], (want * step).sum((1, 2, 3, 4)), rtol=1e-9, atol=1e-9)


@every_small
def test_every_branch_and_all_features_may_be_dropped(name):
    model = small(name, drop_path_rate=0.1, drop_rate=1.0).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 1.0
        if isinstance(module, ConvPosition):  # added beside the branches, and never dropped
            module.conv.requires_grad_(False).weight.zero_(), module.conv.bias.zero_()
    kept = []

    def note(block, inputs, output):
        before, after = inputs[0], output[0] if isinstance(output, tuple) else output
        if before.shape == after.shape:  # a block may halve the map
            kept.append(torch.equal(before, after))

    for block in (block for stage in model.stages for block in stage.blocks):
        block.register_forward_hook(note)
    assert not model.forward_head(model.forward_features(torch.randn(2, 3, 64, 64)), pre_logits=True).any()
    assert kept and all(kept)
    assert model.eval().forward_head(torch.randn(2, model.num_features, 2, 2), pre_logits=True).any()


@every_small
@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(name, channels):
    assert small(name, in_chans=channels)(torch.randn(2, channels, 64, 64)).shape == (2, 7)


@every_small
def test_layer_groups(name):
    model = small(name)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == {key for key, _ in model.named_parameters()}
    assert groups["stem.conv1.weight"] == 0
    assert groups["head.fc.weight"] == max(groups.values())
    last = max(groups[key] for key in groups if key.startswith("stages."))
    before = last if model.head.norms_features else groups["head.fc.weight"]  # a norm of features is not the head's
    assert {groups[key] for key in groups if key.startswith("head.before.")} <= {before} and last < max(groups.values())
    keys = [next(key for key in groups if key.startswith(f"stages.2.blocks.{i}.")) for i in (0, 1)]
    assert groups[keys[1]] == groups[keys[0]] + 1
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse[keys[1]] == coarse[keys[0]]


@every_small
def test_no_decay(name):
    model = small(name)
    kept = {key for key, _ in model.named_parameters() if key.rsplit(".", 1)[-1] in model.no_decay}
    assert model.no_weight_decay() == kept and bool(kept) == bool(model.no_decay)


def test_resized_table():
    table = torch.arange(9.0).view(1, 3, 3)
    assert resize_table(table, (3, 3)) is table
    big = resize_table(table, (6, 6), "bilinear")
    assert big.shape == (1, 6, 6)
    # half-pixel centres: the mean and the corner values stay
    torch.testing.assert_close(big.mean(), table.mean())
    assert big[0, 0, 0] == 0 and big[0, -1, -1] == 8
    assert resize_table(table.bfloat16(), (5, 5)).dtype == torch.bfloat16


def test_inner_windows_do_not_see_the_padding():
    torch.manual_seed(0)
    attention = WindowAttention(32, 2, 7).double()
    x = torch.randn(2, 30, 31, 32, dtype=torch.float64)
    torch.testing.assert_close(attention(x)[:, :28, :28], attention(x[:, :28, :28]), rtol=0, atol=1e-14)
    # nor do windows at the border see anything but the map: they attend as if cut off, wherever the map ends
    corner = x[:, 28:, 28:]
    torch.testing.assert_close(attention(x)[:, 28:, 28:], attention(corner), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "given",
    [
        *({"in_chans": 0}, {"in_chans": 2.0}, {"img_size": 0}, {"img_size": (224,)}),
        *({"in_chans": -1}, {"num_classes": -1}, {"num_classes": 10.0}, {"num_classes": float("nan")}),
    ],
)
@every_small
def test_images_and_classes_that_there_are_not(name, given):
    (key,) = given
    with pytest.raises(ValueError, match=f"{key} is .*: expected"):
        small(name, **given)


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
        ("biformer_t", {"heads": (0, 2, 2, 2)}, "dim 32 does not divide into 0 heads"),
        ("stvit_b", {"layer_scale_stages": (7,)}, r"stages is \(7,\): expected numbers of stages, from 0 to 3"),
        ("stvit_b", {"layer_scale_stages": (2, -1)}, r"stages is \(2, -1\): expected numbers of stages, from 0 to 3"),
        ("stvit_b", {"heads": (-1, 1, 2, 2)}, "dim 32 does not divide into -1 heads"),
        ("sgformer_b", {"heads": (0, 2, 4, 2)}, "dim is 32, heads 0: expected an even number of heads"),
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
    with pytest.raises(
        ValueError, match=r"depths is \(1, 1\).*: expected (one number per stage in each|a number for each of 4 stages)"
    ):
        small(name, depths=(1, 1))


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@every_small
def test_other_numbers_of_stages(name, stages):
    given = {key: (*value, value[-1])[:stages] for key, value in SMALL[name].items() if isinstance(value, tuple)}
    given |= PER_STAGE.get(name, lambda stages: {})(stages)
    if stages > MOST_STAGES.get(name, stages) or name in FOUR_STAGES:
        with pytest.raises(ValueError, match=r"expected (a number for each of|at most) 4 stages"):
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


@every_small
def test_biases_per_relative_position_start_small(name):
    model = small(name)
    tables = [p.detach().flatten() for key, p in model.named_parameters() if key.endswith(".rpb")]
    assert bool(tables) == name.startswith(("maxvit", "gcvit", "dinat", "vitrpb"))
    if tables:
        assert torch.cat(tables).std().item() == pytest.approx(0.02, rel=0.1)


def test_depthwise_convolutions_start_by_their_own_fan():
    conv = torch.nn.Conv2d(512, 512, 3, groups=512)
    init_fan_out(conv)
    assert conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)


def test_a_new_classifier_starts_as_the_first_did():
    model = small("davit_t")
    model.reset_classifier(1000)
    classifier = model.get_classifier()
    assert classifier.weight.std().item() == pytest.approx(0.02, rel=0.1) and not classifier.bias.any()
