"""What is SG-Former's alone: significance and what is ranked by it, two enumerations, its table of positions."""

import pytest
import torch
from timm.models import create_model
from torch import nn
from torch.nn import functional as F

import golden
import oracles
import zoo
from builds import small, trained
from zoo import table
from zoo.blocks import PositionTable
from zoo.sgformer import STAGES, VARIANTS, Block, GuidedAttention, HybridAttention, PlainAttention

# 0.6 to 0.8 % above the published code's: significance is an op of its own, which multiplies queries and keys again
GFLOPS = {"sgformer_s": 4.784, "sgformer_m": 7.427, "sgformer_b": 15.543}


def attend(q, k, v, heads):
    """Attention of (B, N, C) to (B, M, C), and the attention itself, (B, heads, N, M)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (attention @ v).transpose(1, 2).flatten(2), attention


def lepe(module, x):
    """The convolution of the projected input, (B, H, W, C) -> (B, N, C)."""
    linear, conv = module.lepe.linear, module.lepe.conv[0]
    x = F.conv2d(linear(x).permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=x.shape[-1])
    return x.flatten(2).mT


def away_from_zero(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def test_hybrid_attention():
    """Half of the heads see a reduced map, without what does not fill it; half see their window, cut at the border."""
    module = away_from_zero(HybridAttention(16, 4, 4))
    x = torch.randn(2, 13, 9, 16, dtype=torch.float64, requires_grad=True)
    out, significance = module(x, x)
    reduced = F.conv2d(x.permute(0, 3, 1, 2)[:, :, :12, :8], module.reduce.weight, module.reduce.bias, stride=4)
    reduced = F.gelu(F.layer_norm(reduced.permute(0, 2, 3, 1), (16,), module.norm.weight, module.norm.bias, 1e-5))
    k, v = module.kv1(reduced.flatten(1, 2)).chunk(2, -1)  # (B, 6, 8)
    far, attention = attend(module.q1(x).flatten(1, 2), k, v, 2)
    received = attention.mean((1, 2)).view(2, 3, 2)
    received = received[:, torch.arange(13) * 3 // 13][:, :, torch.arange(9) * 2 // 9]  # nearest
    near, here = torch.zeros(2, 13, 9, 8, dtype=torch.float64), torch.zeros(2, 13, 9, dtype=torch.float64)
    for part in [(slice(None), slice(a, a + 7), slice(b, b + 7)) for a in (0, 7) for b in (0, 7)]:
        inside, (rows, columns) = x[part].flatten(1, 2), x[part].shape[1:3]
        tokens, attention = attend(module.q2(inside), *module.kv2(inside).chunk(2, -1), 2)
        near[part], here[part] = tokens.unflatten(1, (rows, columns)), attention.mean((1, 2)).view(2, rows, columns)
    expected = module.proj(torch.cat([far, near.flatten(1, 2)], -1) + lepe(module, x)).view_as(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(significance, (received + here).detach(), rtol=0, atol=1e-14)
    assert not significance.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_guided_attention(tied):
    """The first half of the heads sees tokens ranked by rows, the second by columns: with ties alone they differ."""
    module = away_from_zero(GuidedAttention(16, 4, (3, 2), (1, 1)))
    x = torch.randn(1, 4, 6, 16, dtype=torch.float64)
    significance = torch.zeros(1, 4, 6) if tied else torch.randn(1, 4, 6)
    by_rows, by_columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
    if not tied:
        by_rows = by_columns = by_rows[:, significance.flatten().argsort()]  # ascending
    halves = []
    for tokens, kv in ((by_rows, module.kv1), (by_columns, module.kv2)):
        groups = zip(tokens.split(12, 1), module.merge, strict=True)
        merged = [layer(group.unflatten(1, (-1, layer.in_features)).mT).squeeze(-1) for group, layer in groups]
        halves.append(kv(torch.cat(merged, 1)).chunk(2, -1))
    k, v = (torch.cat(pair, -1) for pair in zip(*halves, strict=True))
    expected = module.proj(attend(module.q(x).flatten(1, 2), k, v, 4)[0] + lepe(module, x)).view_as(x)
    out, handed_on = module(x, significance)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert handed_on is significance


def test_plain_attention():
    module = away_from_zero(PlainAttention(16, 4))
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    tokens = x.flatten(1, 2)
    expected = module.proj(attend(module.q(tokens), *module.kv(tokens).chunk(2, -1), 4)[0] + lepe(module, x))
    torch.testing.assert_close(module(x, x)[0], expected.view_as(x), rtol=0, atol=1e-12)


def test_significance_comes_from_the_block_before():
    """Blocks take turns; what a stage's last block made does not reach the next stage."""
    model = trained(small("sgformer_b", depths=(3, 4, 2, 2)))
    for stage, kinds in zip(model.stages, ("hgh", "hghg", "hg", "pp"), strict=True):
        names = {"h": HybridAttention, "g": GuidedAttention, "p": PlainAttention}
        assert [type(block.attn) for block in stage.blocks] == [names[kind] for kind in kinds]
    made, used = [], []
    for module in model.modules():
        if isinstance(module, HybridAttention):
            module.register_forward_hook(lambda module, args, out: made.append(out[1]))
        if isinstance(module, GuidedAttention):
            module.register_forward_hook(lambda module, args, out: used.append((len(made), args[1])))
    model(torch.randn(2, 3, 64, 96))
    assert [count for count, _ in used] == [1, 3, 4, 5]
    assert all(significance is made[count - 1] for count, significance in used)


@pytest.mark.parametrize(("img_size", "counts"), [(224, (60, 60, 147)), (448, (240, 240, 588))])
def test_merged_tokens(img_size, counts):
    """Runs keep their length in a larger image: there are more of them."""
    model, seen = small("sgformer_b", depths=(2, 2, 2, 1)).eval(), []
    for module in model.modules():
        if isinstance(module, GuidedAttention):
            module.kv1.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        model(torch.randn(1, 3, img_size, img_size))
    assert tuple(seen) == counts


@pytest.mark.parametrize("name", VARIANTS)
def test_structure(name):
    model = create_model(name, device="meta")
    groups = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(groups) == 12 and {(m.num_groups, m.eps) for m in groups} == {(1, 1e-5)}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    wide = {key for key, m in model.named_modules() if isinstance(m, nn.LayerNorm) and m.eps == 1e-5}
    fine = {key for key, m in model.named_modules() if isinstance(m, nn.LayerNorm) and m.eps == 1e-6}
    reduced = {key for key, m in model.named_modules() if isinstance(m, HybridAttention)}
    assert wide == {"stem.norm", *(f"{key}.norm" for key in reduced)}
    assert len(fine) == 2 * sum(VARIANTS[name]["depths"]) + 4
    for stage, row in zip(model.stages, STAGES, strict=False):
        runs = {tuple(f.in_features for f in m.merge) for m in stage.modules() if isinstance(m, GuidedAttention)}
        assert runs == {row[1]}
    assert table.gflops(name) == pytest.approx(GFLOPS[name], rel=0.01)


def test_positions_start_as_sines():
    """The first half of the channels tells the column, the second the row."""
    grid = PositionTable(16, (3, 5)).table.detach().view(3, 5, 16)
    for row in range(3):
        for column in range(5):
            for i in range(4):
                rate = 10000 ** -(i / 4)
                angles = torch.tensor([column * rate, row * rate])
                want = torch.stack([angles.sin(), angles.cos()], 1).flatten()
                torch.testing.assert_close(grid[row, column, i::4], want, rtol=0, atol=1e-6)


def test_positions_of_other_maps():
    """Read in order where there are as many tokens, as published; else interpolated as the authors' helper does."""
    positions = PositionTable(8, (4, 4))
    nn.init.normal_(positions.table)
    zeros = torch.zeros(1, 2, 8, 8)
    torch.testing.assert_close(positions(zeros), positions.table.view(1, 2, 8, 8))
    image = positions.table.view(1, 4, 4, 8).permute(0, 3, 1, 2)
    resized = F.interpolate(image, (5, 7), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(positions(torch.zeros(1, 5, 7, 8)), resized)
    positions.set_grid((5, 7))
    torch.testing.assert_close(positions(torch.zeros(1, 5, 7, 8)), resized)
    with pytest.raises(ValueError, match="dim is 6: expected a multiple of 4"):
        PositionTable(6, (4, 4))


def test_built_for_another_size(tmp_path):
    """A released table is interpolated, and the model is then what the other one is at this size."""
    source = trained(small("sgformer_b", img_size=64))
    torch.save(official(source), tmp_path / "official.pth")
    x = torch.randn(1, 3, 96, 160)
    for img_size in ((96, 160), 64):
        model = small("sgformer_b", img_size=img_size).eval()
        report = zoo.load_checkpoint(model, tmp_path / "official.pth")
        assert report.layout == "official"
        assert report.resized == (["stem.position.table"] if img_size != 64 else [])
        model.set_input_size((96, 160))
        assert model.stem.position.grid == (24, 40) and model.stem.position.table.shape == (1, 960, 32)
        torch.testing.assert_close(model(x), source(x))


def official(model):
    (layout,) = zoo.layouts.LAYOUTS["SGFormer"]
    return layout.to_theirs(model.state_dict())


@pytest.mark.parametrize("size", [(112, 448), (224, 224)])
def test_as_many_tokens_as_published(size, tmp_path):
    """Against the published arithmetic written out, which reads its table in order; made for the size it is another.

    Heads are of 24 channels in the first stage, as the base model's, and the last stage has two blocks.
    """
    options = {"dims": (48, 64, 64, 64), "depths": (2, 2, 2, 2), "dtype": torch.float64}
    model = trained(small("sgformer_b", **options))
    assert {block.attn.q.in_features // block.attn.heads for block in model.stages[0].blocks[1:]} == {24}
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    expected = oracles.sgformer(official(model), x, (2, 2, 4, 2))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    torch.save(official(model), tmp_path / "official.pth")
    made_for_it = small("sgformer_b", img_size=size, **options).eval()
    zoo.load_checkpoint(made_for_it, tmp_path / "official.pth")
    assert torch.allclose(made_for_it(x), expected) == (size == (224, 224))


def test_table_of_another_grid_is_refused(tmp_path):
    state = official(small("sgformer_b", img_size=(64, 96)))  # 16 x 24 entries: no square
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(zoo.CheckpointError, match=r"stem.position.table \(1, 384, 32\) instead of \(1, 256, 32\)"):
        zoo.load_checkpoint(small("sgformer_b", img_size=64), tmp_path / "wide.pth")


def test_averaged_weights_are_the_published_ones(tmp_path):
    raw, averaged = trained(small("sgformer_b")), small("sgformer_b")
    content = {"state_dict": official(raw), "state_dict_ema": official(averaged), "epoch": 300, "metric": 83.2}
    torch.save(content, tmp_path / "trained.pth.tar")
    model = small("sgformer_b")
    for weights, entry, source in (("auto", "ema", averaged), ("raw", "raw", raw)):
        assert zoo.load_checkpoint(model, tmp_path / "trained.pth.tar", weights=weights).entry == entry
        assert torch.equal(model.head.fc.weight, source.head.fc.weight)


def test_recognised_at_another_size():
    """A file for 448 pixels differs in its table alone."""
    record = golden.load(golden.FOLDER / "sgformer_s_448x448.json")
    assert zoo.identify(golden.official_state_dict(record, torch.float32)) == [("sgformer_s", "official")]


def test_first_values():
    """Convolutions start by what leaves them, of depthwise ones a channel's alone."""
    model, depthwise = small("sgformer_b"), 0
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            assert m.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.15), name
            assert m.bias is None or not m.bias.any()
            depthwise += m.groups > 1
        if isinstance(m, nn.Linear):
            assert m.weight.abs().max() < 0.12 and not m.bias.any(), name
            assert m.weight.numel() < 1000 or m.weight.std().item() == pytest.approx(0.02, rel=0.1), name
    assert depthwise == 3 + 2 * 6


@pytest.mark.parametrize("given", [{"depths": (2, 4)}, {"dims": (32, 32)}, {"heads": (2, 4, 8, 16, 16)}])
def test_stages_have_all_their_numbers(given):
    with pytest.raises(ValueError, match=r"dims is .*, depths is .*, heads is .*: expected one number per stage"):
        create_model("sgformer_s", device="meta", **given)


def test_a_block_that_drops_both_branches_is_the_identity():
    block, x = Block(8, PlainAttention(8, 2), 1.0).train(), torch.randn(2, 4, 4, 8)
    assert torch.equal(block(x, x[..., 0])[0], x)
