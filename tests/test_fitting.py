"""Weights made for other classes, channels, windows or positions than the model's."""

import logging
import re

import pytest
import timm
import torch
from torch import nn

import zoo
from builds import NAME, refused, same, small, state_of, timm_state, trained, without
from families import SMALL
from zoo.checkpoint import load_checkpoint
from zoo.heads import segmenter


def test_another_number_of_classes(tmp_path, source, caplog):
    path = tmp_path / "seven.pth"
    torch.save(timm_state(source), path)
    model = small(NAME, num_classes=3)
    fresh = model.head.fc.weight.clone()
    report = load_checkpoint(model, path)
    assert report.head_remade and "no classifier for 3 classes" in report.message
    assert torch.equal(model.head.fc.weight, fresh)
    assert torch.equal(model.stem.conv1.weight, source.stem.conv1.weight)
    overlay = {"file": str(path)}
    again = small(NAME, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    assert "no classifier for 3 classes" in caplog.text
    assert torch.equal(again.stem.conv1.weight, source.stem.conv1.weight)
    # without a number of its own, a model takes the checkpoint's
    kept = timm.create_model(NAME, **SMALL[NAME], pretrained=True, pretrained_cfg_overlay=overlay)
    assert kept.num_classes == 7 and torch.equal(kept.head.fc.weight, source.head.fc.weight)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(tmp_path, source, channels):
    path = tmp_path / "rgb.pth"
    torch.save(timm_state(source), path)
    model = small(NAME, in_chans=channels)
    report = load_checkpoint(model, path)
    assert report.channels == 3
    assert "first convolution, for images of 3 channels, converted to the model's" in report.message
    assert load_checkpoint(small(NAME), path).channels is None
    overlay = {"file": str(path)}
    by_timm = small(NAME, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(model, state_of(by_timm))
    summed = source.stem.conv1.weight.sum(1)
    if channels == 1:
        torch.testing.assert_close(model.stem.conv1.weight[:, 0], summed)


def test_other_channels_of_a_segmenter(tmp_path):
    path, args = tmp_path / "rgb.pth", {"head": "fcn", "channels": 8, **SMALL[NAME]}
    source, model = segmenter(NAME, 3, **args), segmenter(NAME, 3, in_chans=1, **args)
    torch.save(source.state_dict(), path)
    assert load_checkpoint(model, path).channels == 3
    conv = "backbone.model.stem.conv1.weight"
    summed = source.state_dict()[conv].sum(1, keepdim=True)
    assert same(model, source.state_dict() | {conv: summed})


def test_channels_that_cannot_be_made_others(tmp_path):
    path = tmp_path / "four.pth"
    torch.save(small(NAME, in_chans=4).state_dict(), path)
    for channels in (1, 3, 5):
        said = f"for images of 4 channels, which cannot be converted to {channels}"
        refused(path, said, small(NAME, in_chans=channels))
        with pytest.raises(zoo.CheckpointError, match=said):
            small(NAME, in_chans=channels, pretrained=True, pretrained_cfg_overlay={"file": str(path)})


@pytest.mark.parametrize("shape", [(), (3,), (64, 3, 3), (64, 3, 1, 3)])
def test_a_first_layer_that_is_no_convolution(tmp_path, source, shape):
    path, said = tmp_path / "flat.pth", rf"1 of another shape: stem\.conv1\.weight {re.escape(str(shape))} instead of"
    torch.save(state_of(source) | {"stem.conv1.weight": torch.zeros(shape)}, path)
    refused(path, said)
    with pytest.raises(zoo.CheckpointError, match=said):
        small(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)})


def test_other_windows(tmp_path, source):
    path = tmp_path / "windows.pth"
    torch.save(timm_state(source), path)
    model = small(NAME, img_size=(96, 160))
    report = load_checkpoint(model, path)
    assert len(report.resized) == 10
    source.set_input_size((96, 160))
    assert same(model, state_of(source))


@pytest.mark.parametrize("name", [NAME, "gcvit_s"])
def test_windows_of_swapped_sides(tmp_path, name):
    """Their tables have as many entries, in another order."""
    path, source, model = tmp_path / "wide.pth", trained(small(name, img_size=(64, 96))), small(name, img_size=(96, 64))
    torch.save(state_of(source), path)
    report = load_checkpoint(model, path)
    source.set_input_size((96, 64))
    assert report.resized and same(model, state_of(source))
    by_timm = small(name, img_size=(96, 64), pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert same(by_timm, state_of(source))


def test_a_flat_table_of_windows_that_are_not_square(tmp_path):
    """torchvision's does not say its sides; those of the model are taken, and the report says so."""
    path, name, wide = tmp_path / "wide.pth", "maxvit_t_tv", {"img_size": (64, 96)}
    source, model = trained(small(name, **wide)), small(name, **wide)
    torch.save(timm_state(source), path)
    report = load_checkpoint(model, path)
    assert same(model, state_of(source)) and not report.resized
    assert report.in_order == [key for key in state_of(source) if key.endswith("rpb")]
    assert report.message.endswith("image sizes with as many entries: 10")
    torch.save(state_of(source), path)
    assert load_checkpoint(model, path).in_order == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gcvit_s",
            r"Tables of 15 .* 1 x 8, 2 x 3 tokens, in either order: give img_size=\(64, 96\) or \(96, 64\), as",
        ),
        ("maxvit_t_tv", r"Tables of 15 entries .* 1 x 8, 2 x 3 tokens, in either order: give an img_size=, as"),
    ],
    ids=["one size fits", "several do"],
)
def test_what_to_build_for_flat_tables(tmp_path, name, said):
    """An image size for all stages, where only one fits; which side is the longer one, the file does not show."""
    path, source = tmp_path / "wide.pth", trained(small(name, img_size=(64, 96)))
    layout = zoo.layouts.LAYOUTS[type(source).__name__][-1]
    torch.save(layout.to_theirs(source.state_dict()), path)
    refused(path, said, small(name))
    for size in ((64, 96), (96, 64)):
        assert load_checkpoint(small(name, img_size=size), path).layout == layout.name


def test_the_layout_of_a_file_that_does_not_fit(tmp_path):
    path, source = tmp_path / "wide.pth", timm.create_model("gcvit_xxt", img_size=(128, 160))
    for layout in zoo.layouts.LAYOUTS["GCViT"]:
        torch.save(layout.to_theirs(source.state_dict()), path)
        said = rf"gcvit_xxt in layout '{layout.name}'.*give img_size=\(128, 160\) or \(160, 128\), as"
        refused(path, said, timm.create_model("gcvit_xxt"))


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("gcvit_s", "stages.0.blocks.0.attn.fn.rpb", lambda table: table[0, 0, 0]),
        ("gcvit_s", "stages.0.blocks.0.attn.fn.rpb", lambda table: table[:, 0, 0]),
        ("gcvit_s", "stages.0.blocks.0.attn.fn.rpb", lambda table: table[:, :0, :0]),
        ("gcvit_s", "stages.0.blocks.0.attn.fn.rpb", lambda table: table[..., None]),
        ("sgformer_b", "stem.position.table", lambda table: table[0, 0, 0]),
        ("sgformer_b", "stem.position.table", lambda table: table[:, :0]),
    ],
)
def test_tables_that_are_none(tmp_path, name, key, change):
    """They lack heads, sides or entries, or have sides too many."""
    path, state = tmp_path / "weights.pth", state_of(small(name))
    state[key] = change(state[key]).clone()
    torch.save(state, path)
    refused(path, rf"1 of another shape: {re.escape(f'{key} {tuple(state[key].shape)} instead of')}", small(name))


def test_positions_of_a_square_image_and_of_one_with_as_many(tmp_path):
    """Released tables are of square images; what a model itself wrote is that of its own grid."""
    path, key, wide = tmp_path / "weights.pth", "stem.position.table", {"img_size": (32, 128)}
    source = trained(small("sgformer_b", img_size=64))
    resized = trained(small("sgformer_b", img_size=64))
    resized.set_input_size((32, 128))
    (official,) = zoo.layouts.LAYOUTS["SGFormer"]
    torch.save(official.to_theirs(state_of(source)), path)
    model, overlay = small("sgformer_b", **wide), {"file": str(path)}
    report = load_checkpoint(model, path)
    assert report.resized == [key] and same(model, state_of(resized))
    assert same(small("sgformer_b", pretrained=True, pretrained_cfg_overlay=overlay, **wide), state_of(resized))
    report = load_checkpoint(small("sgformer_b", img_size=64), path)
    assert report.resized == report.in_order == []
    torch.save(state_of(resized), path)
    model = small("sgformer_b", **wide)
    report = load_checkpoint(model, path)
    assert same(model, state_of(resized)) and report.resized == [] and report.in_order == [key]
    assert same(small("sgformer_b", pretrained=True, pretrained_cfg_overlay=overlay, **wide), state_of(resized))
    torch.save({f"0.{name}": tensor for name, tensor in state_of(resized).items()}, path)
    report = load_checkpoint(nn.Sequential(small("sgformer_b", **wide)), path)
    assert report.layout == "as is" and report.in_order == [f"0.{key}"]


def test_positions_of_as_many_as_no_square_has(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(state_of(small("sgformer_b", img_size=(32, 64))), path)
    assert load_checkpoint(small("sgformer_b", img_size=(64, 32)), path).in_order == ["stem.position.table"]


def test_features_from_a_classifier(tmp_path, source, caplog):
    path = tmp_path / "features.pth"
    torch.save(timm_state(source), path)
    net = small(
        NAME, features_only=True, feature_norms=True, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    assert "classifier" not in caplog.text
    x = torch.randn(1, 3, 64, 64)
    expected = source.forward_intermediates(x, intermediates_only=True)
    got = [nn.functional.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]) for m in expected]
    for feature, want in zip(net.eval()(x), got, strict=True):
        torch.testing.assert_close(feature.permute(0, 2, 3, 1), want)


@pytest.mark.parametrize("name", ["maxvit_t", "biformer_t", "stvit_b"])  # a BatchNorm in the heads of the last two
def test_weights_without_a_head(tmp_path, name, caplog):
    path, state, model = tmp_path / "headless.pth", state_of(trained(small(name))), small(name)
    trunk, before = without(state, "head."), state_of(model)
    torch.save(trunk, path)
    report = load_checkpoint(model, path)
    fresh = {k for k in state.keys() - trunk.keys() if not k.startswith("head.fc.") and "batches" not in k}
    assert report.head_remade and {*report.new} == fresh and report.new[0] in report.message
    assert same(model, before | trunk)
    # timm asks for every name where its configuration has as many classes
    overlay = {"file": str(path)}
    by_timm = small(name, num_classes=1000, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(by_timm.stem.conv1.weight, model.stem.conv1.weight)
    assert "no classifier for 1000 classes" in caplog.text
    # beside a classifier, the rest of a head is not to be missed
    torch.save(without(state, "head.before.", "head.after."), path)
    refused(path, r"missing: head\.", small(name))
    torch.save(without(trunk, "stem.conv1."), path)
    with pytest.raises(zoo.CheckpointError, match=r"\d missing: .*stem\.conv1\.weight"):
        small(name, num_classes=1000, pretrained=True, pretrained_cfg_overlay=overlay)


def test_weights_that_lack_what_a_model_has(tmp_path, source, caplog):
    """An error, unless timm's argument allows it, which no other difference does."""
    path, before = tmp_path / "cut.pth", state_of(small(NAME))
    kept = without(state_of(source), "stages.3.")
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    for state in (kept, without(timm_state(source), "stages.3.")):
        torch.save(state, path)
        with pytest.raises(zoo.CheckpointError, match=r"\d missing: .*stages\.3\."):
            small(NAME, **given)
        with caplog.at_level(logging.WARNING):
            model = small(NAME, **given, pretrained_strict=False)
        assert same(model, before | kept)
        assert re.search(r"not in the file, newly initialised: stages\.3\..* and \d+ more", caplog.text)
        caplog.clear()
    for wrong, said in (("stem.conv9.bias", "1 left over: stem.conv9.bias"), ("stem.norm1.bias", "1 of another shape")):
        torch.save(kept | {wrong: torch.zeros(3)}, path)
        with pytest.raises(zoo.CheckpointError, match=re.escape(said)):
            small(NAME, **given, pretrained_strict=False)


@pytest.mark.parametrize("part", [{}, {"head.fc.bias": torch.zeros(5)}, {"head.fc.weight": torch.tensor(1.0)}])
def test_half_a_classifier_is_none(tmp_path, source, part, caplog):
    path, model = tmp_path / "half.pth", small(NAME)
    torch.save(without(state_of(source), "head.fc.bias") | part, path)
    fresh = model.head.fc.weight.clone()
    assert load_checkpoint(model, path).head_remade and torch.equal(model.head.fc.weight, fresh)
    small(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert "no classifier for 7 classes in the file" in caplog.text
