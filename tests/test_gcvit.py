"""What is GC ViT's alone: queries that all windows of an image share, and windows for image sizes and for detection."""

import pytest
import timm
import torch
from timm.models import create_model
from torch import nn
from torch.nn import functional as F

import oracles
import zoo
from builds import small, trained
from zoo.blocks import WindowAttention
from zoo.gcvit import GlobalAttention
from zoo.layouts.tables import swin_table

NAME = "gcvit_s"
OFFICIAL = zoo.layouts.LAYOUTS["GCViT"][0]
TIMM = next(layout for layout in zoo.layouts.LAYOUTS["GCViT"] if layout.name == "timm")


def windows(model):
    """The window of each stage."""
    found = [{m.window for m in stage.modules() if isinstance(m, WindowAttention)} for stage in model.stages]
    assert all(
        stage.query.window in sizes and len(sizes) == 1 for stage, sizes in zip(model.stages, found, strict=True)
    )
    return [sizes.pop() for sizes in found]


def pools(model):
    return [isinstance(stage.query.pool, nn.MaxPool2d) for stage in model.stages]


@pytest.mark.parametrize("img_size", [224, 384, (256, 320), (32, 160), (64, 32)])
def test_the_same_windows_as_timms(img_size):
    theirs = timm.create_model("gcvit_xxtiny", img_size=img_size, device="meta").state_dict()
    model = create_model("gcvit_xxt", img_size=img_size, device="meta")
    assert pools(model) == [True, True, False, False]
    ours = TIMM.to_theirs(model.state_dict())
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("img_size", [(64, 96), (32, 160)])
def test_the_same_logits_as_timms(img_size, tmp_path):
    """The second size has windows of 1 x 5: flat tables of 9 entries, which are no squares of 3 x 3."""
    theirs = trained(timm.create_model("gcvit_xxtiny", img_size=img_size, num_classes=5))
    path = tmp_path / "timm.pth"
    torch.save(theirs.state_dict(), path)
    ours = create_model("gcvit_xxt", img_size=img_size, num_classes=5).eval()
    report = zoo.load_checkpoint(ours, path)
    assert report.layout == "timm" and report.resized == []
    x = torch.randn(3, 3, *img_size, dtype=torch.float64)
    torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-9, atol=1e-9)


def test_windows():
    assert windows(create_model("gcvit_l", device="meta")) == [(7, 7), (7, 7), (14, 14), (7, 7)]
    assert windows(create_model("gcvit_l_384", device="meta")) == [(12, 12), (12, 12), (24, 24), (12, 12)]
    assert windows(create_model("gcvit_l_512", device="meta")) == [(16, 16), (16, 16), (32, 32), (16, 16)]
    assert windows(small(NAME, img_size=(97, 33))) == [(4, 2), (4, 2), (7, 3), (4, 2)]
    detection = small(NAME, window_size=24)
    assert windows(detection) == [(24, 24)] * 4 and pools(detection) == [True, True, True, False]
    # whatever image the weights were trained for
    assert pools(small(NAME, img_size=384, window_size=24)) == [True, True, True, False]
    assert pools(small(NAME, img_size=384)) == [True, True, False, False]
    whole = small(NAME, window_size=(7, 7, 14, 7))
    assert windows(whole) == windows(small(NAME)) and pools(whole) == pools(small(NAME))
    assert windows(small(NAME, window_size=(5, 6))) == [(5, 6)] * 4
    with pytest.raises(ValueError, match=r"window_size is \(7, 7, 14\)"):
        small(NAME, window_size=(7, 7, 14))


@pytest.mark.parametrize("img_size", [64, (97, 33), (250, 318)])
def test_a_window_of_queries_at_the_size_it_was_built_for(img_size):
    """Nothing is interpolated there, whatever the size."""
    model = small(NAME, img_size=img_size)
    x = model.stem(torch.randn(1, 3, *model.img_size))
    for stage in model.stages:
        query = stage.downsample(x).permute(0, 3, 1, 2)
        for conv in stage.query.convs:
            query = stage.query.pool(conv(query))
        assert query.shape[2:] == stage.query.window
        x = stage(x)


@pytest.mark.parametrize("side", [384, 370])
def test_windows_for_384_pixels(side):
    """Against the published arithmetic written out; windows of the second image reach over its border."""
    model = trained(small(NAME, depths=(2, 2, 2, 2), img_size=384, dtype=torch.float64))
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    expected = oracles.gcvit(OFFICIAL.to_theirs(model.state_dict()), x, (12, 12, 24, 12))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("img_size", "rel_pos_bias"), [(224, True), (384, True), (224, False)])
def test_detection(img_size, rel_pos_bias):
    """The same of the detection code's, with layer scale, and with its option to leave out the biases."""
    options = {"features_only": True, "feature_norms": True, "depths": (2, 2, 2, 2), "dtype": torch.float64}
    net = trained(small(NAME, img_size=img_size, window_size=24, rel_pos_bias=rel_pos_bias, **options))
    assert any(key.endswith(".rpb") for key in net.state_dict()) == rel_pos_bias
    x = torch.randn(2, 3, 100, 130, dtype=torch.float64)
    expected = oracles.gcvit(OFFICIAL.to_theirs(net.model.state_dict()), x, (24,) * 4, detection=True)
    for feature, want in zip(net(x), expected, strict=True):
        torch.testing.assert_close(feature, want.permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)


def test_images_keep_their_own_queries():
    model = trained(small(NAME)).double()
    x = torch.randn(3, 3, 70, 90, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-9)


def test_stages_without_a_global_block():
    """They have no generator of queries, whose weights would get no gradient."""
    model = trained(small(NAME, depths=(1, 2, 1, 1), img_size=64))
    assert [stage.query is None for stage in model.stages] == [True, False, True, True]
    assert {key.split(".")[1] for key in model.state_dict() if ".query." in key} == {"1"}
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    model.set_grad_checkpointing()
    model.set_input_size(96)
    found = [{m.window for m in stage.modules() if isinstance(m, WindowAttention)} for stage in model.stages]
    assert found == [{(3, 3)}, {(3, 3)}, {(6, 6)}, {(3, 3)}] and model.stages[1].query.window == (3, 3)
    assert model.train()(torch.randn(2, 3, 96, 96)).isfinite().all()


def test_global_attention_is_attention_with_the_same_queries_everywhere():
    torch.manual_seed(0)
    attention = GlobalAttention(64, (3, 4)).double()
    nn.init.normal_(attention.qkv.bias)
    x, query = torch.randn(2, 7, 8, 64).double(), torch.randn(2, 3, 4, 2, 32).double()
    keys, values = attention.qkv(F.pad(x, (0, 0, 0, 0, 0, 2)))[:, 3:6, 4:8].flatten(1, 2).split(64, -1)
    heads = [t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (query.flatten(1, 2).flatten(-2), keys, values)]
    bias = torch.stack(
        [
            attention.rpb[:, 2 - i // 4 : 5 - i // 4, 3 - i % 4 : 7 - i % 4].flatten(1)  # key - query + window - 1
            for i in range(12)
        ],
        1,
    )
    expected = F.scaled_dot_product_attention(*heads, bias).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(attention(x, query)[:, 3:6, 4:8], attention.proj(expected).unflatten(1, (3, 4)))
    # a window that reaches over the border sees zeros there
    padded = attention(F.pad(x, (0, 0, 0, 0, 0, 2)), query)[:, :7]
    torch.testing.assert_close(attention(x, query), padded)


def test_tables_for_detection(tmp_path):
    """Released tables are interpolated to the detection windows as its authors' code does it."""
    source = trained(small(NAME))
    official = OFFICIAL.to_theirs(source.state_dict())
    path = tmp_path / "official.pth.tar"
    torch.save({"state_dict": official}, path)
    model = small(NAME, window_size=24)
    report = zoo.load_checkpoint(model, path)
    assert report.layout == "official" and len(report.resized) == 9
    table = official["levels.2.blocks.1.attn.relative_position_bias_table"]  # (27 * 27, heads)
    heads = table.shape[1]
    resized = F.interpolate(table.T.reshape(1, heads, 27, 27), (47, 47), mode="bicubic", align_corners=False)
    expected = swin_table(resized.reshape(heads, 47 * 47).T)
    torch.testing.assert_close(model.stages[2].blocks[1].attn.fn.rpb.detach(), expected)


def test_another_size_after_building():
    model = trained(small(NAME, img_size=64))
    model.set_input_size(img_size=(96, 128))
    assert windows(model) == [(3, 4), (3, 4), (6, 8), (3, 4)]
    model.set_input_size(window_size=5)
    assert windows(model) == [(5, 5)] * 4 and pools(model) == [True, True, True, False]
    model.set_input_size()
    assert windows(model) == [(3, 4), (3, 4), (6, 8), (3, 4)] and pools(model) == [True, True, False, False]
    assert model(torch.randn(1, 3, 96, 128)).isfinite().all()


def test_layer_scale():
    assert small(NAME).stages[0].blocks[1].attn.scale.gamma.detach().unique().item() == pytest.approx(1e-5)
    assert not any(key.endswith("gamma") for key in create_model("gcvit_t2", device="meta").state_dict())
