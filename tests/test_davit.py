"""What is DaViT's alone: attention between channels, zeros around the map."""

import pytest
import timm
import torch
from timm.models import create_model
from torch.nn import functional as F

import oracles
import zoo
from builds import small, trained
from zoo.blocks import WindowAttention, pad_to_multiple
from zoo.davit import ChannelAttention

# timm counts this one with windows of 7
PORTS = {"davit_t": "davit_tiny", "davit_l": "davit_large", "davit_h": "davit_huge", "davit_g": "davit_giant"}


@pytest.mark.parametrize("name", PORTS)
def test_the_same_weights_as_timms(name):
    theirs = create_model(PORTS[name], device="meta").state_dict()
    layout = next(layout for layout in zoo.layouts.LAYOUTS["DaViT"] if layout.name == "timm")
    ours = create_model(name, device="meta").state_dict()
    assert {layout.theirs(key): value.shape for key, value in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("size", [(97, 33), (64, 150)])
def test_the_same_logits_as_timms(size, tmp_path):
    theirs = trained(timm.create_model("davit_tiny", num_classes=5))
    path = tmp_path / "timm.pth"
    torch.save(theirs.state_dict(), path)
    ours = create_model("davit_t", num_classes=5).eval()
    assert zoo.load_checkpoint(ours, path).layout == "timm"
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-9, atol=1e-9)


def test_windows():
    for name in PORTS:
        windows = {m.window for m in create_model(name, device="meta").modules() if isinstance(m, WindowAttention)}
        assert windows == {(7, 7)}
    large = create_model("davit_l_384", device="meta")
    assert {m.window for m in large.modules() if isinstance(m, WindowAttention)} == {(12, 12)}
    assert not any(key.endswith("rpb") for key in large.state_dict())


def test_windows_of_12():
    """Against the published arithmetic written out, where windows reach over the border."""
    model = trained(small("davit_t", window_size=12, dtype=torch.float64))
    x = torch.randn(2, 3, 101, 150, dtype=torch.float64)
    expected = oracles.davit(zoo.layouts.LAYOUTS["DaViT"][0].to_theirs(model.state_dict()), x, 12)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_zeros_outside_the_map_are_attended(rel_pos_bias):
    torch.manual_seed(0)
    attention = WindowAttention(32, 2, 4, rel_pos_bias=rel_pos_bias, attend_padding=True).double()
    torch.nn.init.normal_(attention.qkv.bias)
    x = torch.randn(2, 9, 10, 32, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 2, 0, 3))
    torch.testing.assert_close(attention(x), attention(padded)[:, :9, :10], rtol=0, atol=1e-14)
    masked = WindowAttention(32, 2, 4, rel_pos_bias=rel_pos_bias).double()
    masked.load_state_dict(attention.state_dict())
    assert not torch.allclose(attention(x), masked(x))


def test_channel_attention_mixes_channels_of_a_head():
    """Equal tokens, one head of 32 channels: what is left is a matrix of channels, here written out."""
    torch.manual_seed(0)
    attention = ChannelAttention(32, 1).double()
    x = torch.randn(1, 1, 1, 32, dtype=torch.float64).expand(1, 3, 5, 32)
    q, k, v = attention.qkv(x[0, 0, 0]).split(32)
    mixed = torch.softmax(15 * 32**-0.5 * k[:, None] * v[None, :], 1) @ q
    torch.testing.assert_close(attention(x), attention.proj(mixed).expand(1, 3, 5, 32))


def test_padding():
    x = torch.ones(1, 2, 6, 8)
    assert pad_to_multiple(x, 2) is x
    padded = pad_to_multiple(x, 5)
    assert padded.shape == (1, 2, 10, 10) and padded.sum() == x.sum() and torch.equal(padded[:, :, :6, :8], x)


def test_nothing_depends_on_the_image_size():
    torch.manual_seed(2)
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(trained(small("davit_t", img_size=64))(x), trained(small("davit_t"))(x))
