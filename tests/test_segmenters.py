"""Whole segmenters: files in the published layout and in ours, any backbone, any size, learning."""

import pickle
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import golden
import zoo
from dense_cases import tiny
from head_records import load
from steps import losses_of
from zoo.heads import detector, inference, segmenter
from zoo.heads.plain import pyramid_of
from zoo.heads.recognise import recognise_dense
from zoo.heads.segmenter import auxiliary_head

# record of a backbone, and how the model is built
FILES = {
    "dinat": ("dinat_tiny_seg_256x320", "dinat_t", {"channels": 32, "dilations": "segmentation"}),
    "davit": ("seg_DaViT_tiny_250x318", "davit_t", {"channels": 32}),
    "litv2": ("seg_litv2_s_250x318", "litv2_s", {"head": "semantic_fpn"}),
}


def backbone_state(record):
    """The record's backbone. DiNAT's is a classifier: its norm becomes the last level's, the others are filled."""
    state = golden.official_state_dict(record)
    if "norm.weight" in state:
        for part in ("weight", "bias"):
            state[f"norm3.{part}"] = state.pop(f"norm.{part}")
            del state[f"head.{part}"]
            for i, dim in enumerate((64, 128, 256)):
                state |= golden.filled([(f"norm{i}.{part}", [dim], "value")])
    return {f"backbone.{key}": value for key, value in state.items()}


def answer(record, maps):
    means = [x.mean((2, 3)) for x in maps]
    state = golden.official_state_dict(record)
    return (
        F.linear(means[-1], state["head.weight"], state["head.bias"]) if "head.weight" in state else torch.cat(means, 1)
    )


@pytest.mark.parametrize("family", ["dinat", pytest.param("davit", marks=pytest.mark.slow), "litv2"])
@torch.no_grad()
def test_files_of_segmenters_load(family, tmp_path):
    """The backbone within then gives its record's maps, and the file that we write of it is theirs again."""
    stem, name, kwargs = FILES[family]
    record = golden.load(golden.FOLDER / f"{stem}.json")
    model = segmenter(name, 150, dtype=torch.float64, **kwargs).double().eval()
    theirs = model.layouts()[0].theirs
    heads = [(theirs(k), v) for k, v in model.state_dict().items() if not k.startswith("backbone.")]
    kinds = [(key, list(value.shape), "value" if value.is_floating_point() else "integer") for key, value in heads]
    state = backbone_state(record) | golden.filled(kinds)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "released.pth")
    report = zoo.load_checkpoint(model, tmp_path / "released.pth")
    assert report.layout == "mmseg-official" and not report.head_remade and not report.left_out
    maps = model.backbone(golden.image(*record["size"]))
    assert golden.relative_error(answer(record, maps), golden.unpack(record["logits"])) < 1e-9
    written = model.layouts()[0].to_theirs(model.state_dict())
    assert written.keys() == state.keys() and all(torch.equal(written[k], state[k]) for k in written)


def test_whole_files_have_the_published_names():
    """Of the heads, from the records; those of the backbones are the records' own."""
    for stem, kwargs in (("semfpn_64x64", {"head": "semantic_fpn"}), ("uperhead_c64_60x84", {"channels": 64})):
        model = segmenter("resnet18", 150, auxiliary=False, **kwargs)
        names = {model.layouts()[0].theirs(k): list(v.shape) for k, v in model.state_dict().items()}
        want = {key: shape for key, shape, _ in load(stem)["entries"]}
        assert {k: v for k, v in names.items() if not k.startswith("backbone.")} == want


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small segmenter and its file in the published layout."""
    model, path = tiny(), tmp_path_factory.mktemp("small") / "small.pth"
    torch.save({"state_dict": model.layouts()[0].to_theirs(model.state_dict())}, path)
    return model, path


def test_own_files_load(small, tmp_path):
    model, _ = small
    torch.save(model.state_dict(), tmp_path / "own.pth")
    other = tiny()
    assert zoo.load_checkpoint(other, tmp_path / "own.pth").layout == "zoo"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_auxiliary_head_is_left_out_where_the_model_has_none(small):
    report = zoo.load_checkpoint(tiny(auxiliary=False), small[1])
    assert report.left_out == {"auxiliary_head": 8} and "auxiliary_head (8 tensors)" in report.message


def test_a_single_number_has_no_channels(small):
    state = zoo.read(small[1]).entries["raw"]
    for name in ("decode_head.conv_seg.bias", "auxiliary_head.convs.0.conv.weight"):
        assert name in state
        found = recognise_dense({**state, name: torch.tensor(1.0)})
        assert found is None if name.startswith("decode") else not found.options["auxiliary"]


@pytest.mark.parametrize("kind", ["narrow", "several"])
def test_another_auxiliary_head_is_left_out(small, kind, tmp_path):
    """A file that has one of other channels, or more than one, is recognised as without, and else it is said how."""
    state = zoo.read(small[1]).entries["raw"]
    parts = {name: x for name, x in state.items() if name.startswith("auxiliary_head.")}
    assert recognise_dense(state).options == {"channels": 16, "auxiliary": True}
    state = {name: x for name, x in state.items() if name not in parts}
    if kind == "narrow":
        model = tiny()
        model.auxiliary_head = auxiliary_head(64, 5, channels=24)
        theirs = model.layouts()[0].to_theirs(model.state_dict())
        state |= {name: theirs[name] for name in parts}
    else:
        state |= {name.replace("head.", f"head.{i}."): x for name, x in parts.items() for i in (0, 1)}
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    found = recognise_dense(state)
    assert found.options == {"channels": 16, "auxiliary": False}
    assert zoo.load_checkpoint(tiny(**found.options), tmp_path / "other.pth").left_out.keys() == {"auxiliary_head"}
    with pytest.raises(zoo.CheckpointError, match="auxiliary=False builds a segmenter without"):
        zoo.load_checkpoint(tiny(), tmp_path / "other.pth")


def test_dilations_that_a_file_does_not_show_are_said(small):
    """The published segmenters have others than classifiers, and the same tensors."""
    said = "the authors' are built with dilations='segmentation', which no tensor shows, and this model is not"
    assert said in zoo.load_checkpoint(tiny(), small[1]).message
    for own in ("segmentation", 1):
        assert "dilations" not in zoo.load_checkpoint(tiny(dilations=own), small[1]).message


def test_norms_of_levels_that_no_head_reads_are_left_aside(small, tmp_path):
    """mmseg's backbones return, and norm, all levels; but norms of levels that are read belong to the model."""
    norms = {k: v for k, v in zoo.read(small[1]).entries["raw"].items() if k.startswith("backbone.norm")}
    source = tiny(head="fcn")
    theirs = source.layouts()[0].to_theirs(source.state_dict())
    assert len(norms) == 8 and len(norms.keys() & theirs) == 4
    torch.save({"state_dict": norms | theirs}, tmp_path / "fcn.pth")
    model = tiny(head="fcn")
    assert zoo.load_checkpoint(model, tmp_path / "fcn.pth").layout == "mmseg-official"
    norm = model.backbone.model.feature_norms[3].weight
    assert torch.equal(norm, source.backbone.model.feature_norms[3].weight)
    with pytest.raises(zoo.CheckpointError, match="does not fit this Segmenter"):
        zoo.load_checkpoint(tiny(head="fcn", feature_norms=False), tmp_path / "fcn.pth")


def test_auxiliary_head_is_missed(small, tmp_path):
    state = {k: v for k, v in zoo.read(small[1]).entries["raw"].items() if not k.startswith("auxiliary_head.")}
    torch.save(state, tmp_path / "without.pth")
    with pytest.raises(zoo.CheckpointError, match=r"missing: auxiliary_head\.convs.*: auxiliary=False builds"):
        zoo.load_checkpoint(tiny(), tmp_path / "without.pth")


def test_classifiers_for_other_classes_are_made_anew(small):
    model = segmenter("dinat_m", 7, channels=16, dims=(32, 64, 64, 64), depths=(1, 1, 1, 1))
    before = model.decode_head.classifier.weight.clone()
    report = zoo.load_checkpoint(model, small[1])
    assert report.head_remade and "7 classes" in report.message
    assert torch.equal(before, model.decode_head.classifier.weight)
    assert torch.equal(model.decode_head.fuse.conv.weight, small[0].decode_head.fuse.conv.weight)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"channels": 24}, r"60 of another shape: decode_head\.pools\.0\.conv\.weight \(16, .* instead of \(24, "),
        ({"feature_norms": False}, r"8 left over: backbone\.model\.feature_norms\.0\.weight, "),
        ({"head": "semantic_fpn"}, "Its head is of another kind: give that kind as head="),
    ],
)
def test_files_of_other_segmenters_are_refused(small, kwargs, said):
    model = tiny(**kwargs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(zoo.CheckpointError, match=said) as error:
        zoo.load_checkpoint(model, small[1])
    assert "auxiliary=False" not in str(error.value)  # which would not help
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn", "fcn"])
def test_timm_backbone_of_odd_sizes(head, tmp_path):
    model = segmenter("resnet18", 4, head=head, channels=16).eval()
    images, targets = torch.randn(2, 3, 45, 71), torch.randint(4, (2, 45, 71))
    with torch.no_grad():
        assert model(images).shape == (2, 4, 45, 71)
    losses = model.train()(images, targets)
    assert losses.keys() == ({"decode"} if head == "semantic_fpn" else {"decode", "auxiliary"})
    sum(losses.values()).backward()
    # of a ResNet that gives fewer levels, timm has dropped what is behind them: every parameter takes part
    assert all(p.grad is not None for p in model.parameters())
    torch.save({"state_dict": model.layouts()[0].to_theirs(model.state_dict())}, tmp_path / "file.pth")
    assert zoo.load_checkpoint(model, tmp_path / "file.pth").layout == "mmseg"


@pytest.mark.parametrize("name", ["litv2_s", "sgformer_s"])
def test_images_that_are_smaller_than_a_backbone_takes(name):
    """They are filled up, and what fills them is not learned from: as many pixels as if they had been."""
    model = segmenter(name, 3, head="semantic_fpn", channels=16, dropout=0.0).eval()
    images, targets = torch.randn(2, 3, 9, 70), torch.randint(3, (2, 9, 70))
    filled = F.pad(images, (0, 0, 0, 23)), F.pad(targets, (0, 0, 0, 23), value=255)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(filled[0])[:, :, :9])
        assert model(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)
        assert model(images, targets) == model(*filled)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dla46_c", {}),
        ("hrnet_w18_small", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1), "strict_img_size": False}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4, "dynamic_img_size": True}),
    ],
)
def test_images_of_sizes_that_a_timm_model_does_not_take(name, given):
    """They are filled up to a multiple of its largest stride, as are those for a detector."""
    model = segmenter(name, 3, head="semantic_fpn", channels=16, dropout=0.0, **given).eval()
    images, targets = torch.randn(2, 3, 45, 71), torch.randint(3, (2, 45, 71))
    divisor = model.backbone.feature_info.reduction()[-1]
    more = 0, -71 % divisor, 0, -45 % divisor
    filled = F.pad(images, more), F.pad(targets, more, value=255)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(filled[0])[..., :45, :71])
        assert model(images, targets) == model(*filled)


@torch.no_grad()
def test_what_is_not_filled_up():
    """Images for a model that takes any size, or only the one that it is built for, which its stride may not divide."""
    assert tiny().divisor == 1 and segmenter("nat_iso_s", 3, depths=(1, 1, 1, 1), dim=32).divisor == 1
    for name, side in (("levit_128s", 224), ("vit_tiny_patch16_224", 72)):
        model = segmenter(name, 3, head="fcn", channels=8, img_size=side).eval()
        assert side % model.backbone.feature_info.reduction()[-1]
        assert model(torch.randn(1, 3, side, side)).shape == (1, 3, side, side)


@pytest.mark.parametrize("name", ["pit_ti_224", "shvit_s1", "visformer_tiny"])
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_heads_that_read_four_maps_read_three(name, head):
    """Of a model that has no more, whatever timm raises for the fourth."""
    images, targets = torch.randn(2, 3, 224, 224), torch.randint(3, (2, 224, 224))
    model = segmenter(name, 3, head=head, channels=8)
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.decode_head.parameters())
    assert len(model.backbone.feature_info.channels()) == 3


def test_maps_that_a_model_does_not_have():
    with pytest.raises(ValueError, match=r"out_indices are \[0, 1, 2, 3\]; pit_ti_224 has 3 maps: expected 0 to 2"):
        segmenter("pit_ti_224", 3, out_indices=(0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"out_indices are \[-4, -3, -2, -1\]; pit_ti_224 has 3 maps"):
        segmenter("pit_ti_224", 3, out_indices=4)
    with pytest.raises(ValueError, match=r"reads 4 levels, 3 at least; FeatureGetterNet returns 2: give more"):
        segmenter("vit_tiny_patch16_224", 3, depth=2)
    with pytest.raises(AssertionError, match="Unknown"):  # timm's own, of something else
        segmenter("resnet18", 3, feature_cls="other")


@torch.no_grad()
def test_maps_with_channels_last_and_levels_of_one_size():
    swin = segmenter("swin_tiny_patch4_window7_224", 3, channels=8, img_size=64, window_size=2, depths=(1, 1, 1, 1))
    assert swin.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    vit = segmenter("vit_tiny_patch16_224", 3, head="semantic_fpn", channels=8, depth=4, dynamic_img_size=True)
    assert vit.eval()(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_a_pyramid_of_maps_that_have_one_stride(head, tmp_path):
    small = {"depths": (1, 1, 1, 1), "dim": 32, "channels": 16}
    model = segmenter("nat_iso_s", 3, head=head, **small)
    sizes = []
    model.pyramid.register_forward_hook(lambda module, args, out: sizes.extend(x.shape[-2:] for x in out))
    sum(model(torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.long)).values()).backward()
    assert [tuple(size) for size in sizes] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(p.grad is not None for p in model.parameters())
    torch.save(model.state_dict(), tmp_path / "file.pth")
    assert zoo.load_checkpoint(segmenter("nat_iso_s", 3, head=head, **small), tmp_path / "file.pth").layout == "zoo"


@torch.no_grad()
def test_a_pyramid_of_maps_of_one_pixel():
    """A patch of 32 pixels in an image of 32; maps that are larger are pooled as before."""
    pyramid = pyramid_of([4] * 4, [32] * 4)[0]
    for size, coarsest in (((1, 1), (1, 1)), ((1, 5), (1, 2)), ((3, 4), (1, 2))):
        maps = pyramid([torch.randn(1, 4, *size)] * 4)
        assert maps[2].shape[2:] == size and maps[3].shape[2:] == coarsest
    x = torch.randn(1, 4, 1, 5)
    assert torch.equal(pyramid.scales[3](x), F.max_pool2d(x, (1, 2)))
    assert torch.equal(pyramid.scales[3](x[..., :1]), x[..., :1])
    vit = segmenter("vit_tiny_patch16_224", 3, head="semantic_fpn", channels=8, depth=4, patch_size=32, img_size=32)
    assert vit.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_strides_of_which_no_pyramid_can_be_made():
    with pytest.raises(ValueError, match="stride of 14 cannot make a pyramid of 4"):
        pyramid_of([8] * 4, [14] * 4)


def test_a_module_as_backbone():
    backbone = timm.create_model("resnet18", features_only=True)  # five levels: the last four are read
    assert segmenter(backbone, 3, channels=8).backbone is backbone
    with pytest.raises(ValueError, match="features_only=True"):
        segmenter(nn.Conv2d(3, 4, 1), 3)
    with pytest.raises(ValueError, match="reads 4 levels"):
        segmenter(timm.create_model("resnet18", features_only=True, out_indices=(3, 4)), 3)
    with pytest.raises(ValueError, match=r"strides \[32, 16, 8, 4\]: give out_indices from fine to coarse"):
        segmenter("nat_m", 3, channels=8, out_indices=(3, 2, 1, 0))
    with pytest.raises(ValueError, match=r"out_indices are \[1, 2, 3, 3\]: name each map once"):
        segmenter("resnet18", 3, out_indices=(1, 2, 3, 3))
    with pytest.raises(ValueError, match="scales are empty"):
        inference.augmented(nn.Identity(), torch.zeros(1, 3, 32, 32), scales=())
    with pytest.raises(ValueError, match="no images to average over"):
        inference.averaged(nn.Identity(), [], (32, 32))
    with pytest.raises(ValueError, match="drop_path_rate cannot be given"):
        segmenter(backbone, 3, drop_path_rate=0.1)


def test_maps_that_are_not_read_have_no_norms():
    """Which would have no gradient: several processes could not train."""
    given = {"depths": [1, 1, 1, 1], "dims": [32, 32, 32, 32], "out_indices": [1, 2, 3]}
    model = segmenter("nat_m", 3, head="fcn", channels=8, **given)
    sum(model(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64)).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.backbone.feature_info.out_indices == (2, 3)


def test_norms_where_the_published_dense_models_have_them():
    from zoo.heads.features import normed

    families = ("dinat_t", "nat_m", "davit_t", "litv2_s", "biformer_t", "gcvit_xxt", "maxvit_t", "stvit_s", "resnet18")
    assert [name for name in families if not normed(name)] == ["maxvit_t", "stvit_s", "resnet18"]
    assert sum(isinstance(m, nn.LayerNorm) for m in tiny().backbone.model.feature_norms) == 4


@pytest.mark.parametrize("build", [segmenter, detector])
@pytest.mark.parametrize("count", [0, 2.5, "3", True])
def test_what_is_no_number_of_classes_or_channels(build, count):
    with pytest.raises(ValueError, match=f"^num_classes is {count!r}: expected the number of classes, 1 or more$"):
        build("nat_m", count)
    with pytest.raises(ValueError, match=f"^channels is {count!r}: expected channels of the .*, 1 or more$"):
        build("nat_m", 3, channels=count)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"'unet'.*upernet, semantic_fpn, fcn"):
        segmenter("resnet18", 3, head="unet")
    with pytest.raises(ValueError, match=r"\(1, 32, 33\)"):
        tiny()(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets are torch\.float32: expected integers, the labels"):
        tiny()(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32))


@pytest.mark.parametrize("side", [32, 20])
def test_targets_of_other_integers(side):
    model, images, targets = tiny().eval(), torch.randn(1, 3, side, side), torch.randint(5, (1, side, side))
    with torch.no_grad():
        want = model(images, targets)
        assert all(model(images, targets.to(dtype)) == want for dtype in (torch.uint8, torch.int32))


@pytest.mark.parametrize("head", ["upernet", "fcn"])
def test_a_file_with_another_head_says_so(small, tmp_path, head):
    """In both layouts; not that it has no auxiliary head."""
    torch.save(tiny(head="semantic_fpn").state_dict(), tmp_path / "own.pth")
    with pytest.raises(zoo.CheckpointError, match=r"Its head is of another kind.*task\.head=.*\.$") as raised:
        zoo.load_checkpoint(tiny(head=head), tmp_path / "own.pth")
    assert "auxiliary=False" not in str(raised.value)
    with pytest.raises(zoo.CheckpointError, match=r"Its head is of another kind"):
        zoo.load_checkpoint(tiny(head="semantic_fpn"), small[1])


def test_loss_falls():
    torch.manual_seed(0)
    model = tiny(dropout=0.0)
    images, targets = (
        torch.randn(2, 3, 64, 64),
        torch.randint(5, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2),
    )
    losses = losses_of(model, images, targets, lr=3e-3, steps=16)
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_exports():
    model, images = tiny().eval(), torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))


def test_what_trainers_ask_for():
    model = segmenter("litv2_s", 3, head="semantic_fpn", channels=16)
    names = dict(model.named_parameters())
    assert model.lr_scales() and model.lr_scales().keys() <= names.keys()
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.backbone.model.stages)


@pytest.mark.parametrize("kind", [{}, {"feature_cls": "hook"}, {"feature_cls": "fx"}], ids=["list", "hook", "fx"])
def test_tables_of_a_model_that_timm_took_apart_do_not_decay(kind):
    model = segmenter("swin_tiny_patch4_window7_224", 3, channels=8, depths=(1, 1, 1, 1), out_indices=(1, 2, 3), **kind)
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) == 4 and model.no_weight_decay() == tables
    assert deepcopy(model).no_weight_decay() == pickle.loads(pickle.dumps(model)).no_weight_decay() == tables


def test_rates_of_a_traced_model():
    model = segmenter("litv2_s", 3, channels=16, feature_cls="fx", feature_norms=False)
    want = segmenter("litv2_s", 3, channels=16).lr_scales()
    scales = {name.replace("backbone.graph_module", "backbone.model"): s for name, s in model.lr_scales().items()}
    assert scales == want and model.lr_scales().keys() <= dict(model.named_parameters()).keys()
