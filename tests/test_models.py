"""What a user of timm expects of every model, and what this zoo adds: any image size."""

import pytest
import timm
import torch
from timm.layers import DropPath, get_channel_dim, get_spatial_dim
from timm.models import create_model, get_model_args, get_model_input_config
from torch.utils.flop_counter import FlopCounterMode

import ops
import zoo
from builds import every_small, small, trained
from families import RESIZED, SMALL
from zoo.blocks import ConvPosition, WindowAttention, image_sides, init_fan_out, resize_table


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
    assert model.num_classes == (21_843 if name == "maxvit_xl" else 1000)


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


@pytest.mark.parametrize("name", ["maxvit_t", "nat_m"])
def test_operations_are_counted_on_every_device(name):
    """With gradients as well: on CPUs, maps of this size are products in another order, without fused attention."""
    counts = set()
    for device in ("cpu", "meta"):
        model, x = create_model(name, device=device), torch.zeros(1, 3, 64, 64, device=device)
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.add(counter.get_total_flops())
    assert len(counts) == 1


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


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_a_configuration_of_another_size(name):
    """As timm's object or as its scripts give it, as a dict; what has no tag of this model's is of no release."""
    size, own = timm.get_pretrained_cfg(name).input_size[1:], name.partition(".")[0]
    given = timm.models.resolve_model_input_args(name, {}), {"pretrained_cfg": timm.get_pretrained_cfg(name)}
    unknown = {"architecture": own, "tag": "mine", "input_size": (3, 64, 64)}
    with torch.device("meta"):
        for kwargs in given:
            assert image_sides(timm.create_model(**{"model_name": own, **kwargs}).img_size) == size
            assert timm.create_model(**{"model_name": own, **kwargs}, img_size=(64, 96)).img_size == (64, 96)
        for cfg in (unknown, unknown | {"tag": None}, timm.models.PretrainedCfg(**unknown)):
            assert timm.create_model(own, pretrained_cfg=cfg).img_size == timm.create_model(own).img_size


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
@pytest.mark.parametrize("training", [True, False])
def test_what_a_change_adds_trains_only_if_the_model_does(name, training):
    model = small(name, feature_norms=True).train(training)
    changes = [lambda: model.reset_classifier(5, "max"), lambda: model.prune_intermediate_layers([1], True)]
    if name in RESIZED:
        changes.insert(0, lambda: model.set_input_size(256))
    for change in changes:
        change()
        assert [path for path, module in model.named_modules() if module.training is not training] == []


def test_a_frozen_norm_stays_so_under_a_new_classifier():
    model = small("biformer_t").train()
    model.head.before.eval()
    model.reset_classifier(5)
    assert model.head.fc.training and not model.head.before.training


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
def test_checkpointing_changes_nothing_that_a_model_learns(name):
    """Neither gradients, with the same blocks dropped, nor the statistics of batch norms, although blocks run twice."""
    x = torch.randn(2, 3, 64, 64)
    learned = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = trained(small(name, drop_path_rate=0.3)).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients = {f"{key}.grad": parameter.grad for key, parameter in model.named_parameters()}
        learned.append({**gradients, **model.state_dict()})
    for key, tensor in learned[0].items():
        assert torch.equal(tensor, learned[1][key]), key


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
    ("name", "given"), [("litv2_s", {}), ("sgformer_b", {}), ("stvit_b", {"differentiable": True})]
)
def test_trains_under_autocast(name, given):
    model = small(name, **given).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, 70, 90))
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


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
