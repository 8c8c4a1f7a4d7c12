"""What a re-implementation of BiFormer gets wrong."""

import pytest
import torch
import torch.nn.functional as F
from timm.models import create_model
from torch import nn

from builds import bare
from zoo import biformer
from zoo.biformer import FloorRoutedAttention, FullAttention, RoutedAttention, ValueFullAttention


def small(name, **kwargs):
    torch.manual_seed(0)
    return bare(name, **kwargs).double().eval()


def attention(cls, *args):
    torch.manual_seed(0)
    layer = cls(*args).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def by_hand(layer, q, k, v, region_of, route):
    """(B, pixels, C): every pixel attends to the pixels of the regions that its own is routed to, one by one."""
    out = torch.zeros_like(q)
    width = q.shape[2] // layer.heads
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            near = torch.isin(region_of, route[b, region_of[i]])
            for head in range(layer.heads):
                part = slice(head * width, (head + 1) * width)
                weights = (q[b, i, part] @ k[b, near, part].T * q.shape[2] ** -0.5).softmax(0)
                out[b, i, part] = weights @ v[b, near, part]
    return out


def regions_of(H, W, h, w):
    """The region, of h x w pixels, of each pixel of a map."""
    row, column = torch.arange(H)[:, None] // h, torch.arange(W) // w
    return (row * -(-W // w) + column).flatten()


def means(x, region_of, count):
    return torch.stack([x[:, region_of == region].mean(1) for region in range(count)], 1)


def convolved(layer, x, H, W):
    """The layer's convolution of (B, H * W, C)."""
    return layer.lepe(x.transpose(1, 2).unflatten(2, (H, W))).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("n_win", [3, (2, 3)])
def test_routed_attention_pads_what_it_projects(n_win):
    """Padded pixels have the bias as query, key and value: they count in means, are attended, and are convolved."""
    layer = attention(RoutedAttention, 8, 2, n_win, 2)
    rows, cols = layer.n_win
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    padded = F.pad(x, [0, 0, 0, 2, 0, 1])  # 6 x 9 pixels
    q, k, v = layer.qkv(padded.flatten(1, 2)).chunk(3, -1)
    region_of = regions_of(6, 9, 6 // rows, 9 // cols)
    route = (means(q, region_of, rows * cols) @ means(k, region_of, rows * cols).transpose(1, 2)).topk(2).indices
    want = layer.proj(by_hand(layer, q, k, v, region_of, route) + convolved(layer, v, 6, 9))
    torch.testing.assert_close(layer(x), want.unflatten(1, (6, 9))[:, :5, :7])


def test_nchw_attention_pads_what_is_projected():
    """Regions have floor(side / n_win) pixels; means leave padding out, but its zero keys are attended."""
    layer = attention(FloorRoutedAttention, 8, 2, 3, 2)
    x = torch.randn(2, 7, 8, 8, dtype=torch.float64)  # regions of 2 x 2: 4 of them down and across
    q, k, v = layer.qkv(x.flatten(1, 2)).chunk(3, -1)
    region_of = regions_of(7, 8, 2, 2)
    route = (means(q, region_of, 16) @ means(k, region_of, 16).transpose(1, 2)).topk(2).indices
    padded = (F.pad(t.unflatten(1, (7, 8)), [0, 0, 0, 0, 0, 1]).flatten(1, 2) for t in (q, k, v))
    attended = by_hand(layer, *padded, regions_of(8, 8, 2, 2), route).unflatten(1, (8, 8))[:, :7]
    want = layer.proj(attended.flatten(1, 2) + convolved(layer, v, 7, 8))
    torch.testing.assert_close(layer(x), want.unflatten(1, (7, 8)))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_not_rounded_before_it_is_ranked(autocast, monkeypatch):
    """Regions are those of the float32 means of what is projected; means in bfloat16 have other ones."""
    layer = attention(FloorRoutedAttention, 32, 2, 7, 4).to(torch.float32 if autocast else torch.bfloat16)
    route_regions, routes = biformer.route_regions, []
    monkeypatch.setattr(biformer, "route_regions", lambda *args: routes.append(route_regions(*args)) or routes[-1])
    x = torch.randn(4, 27, 28, 32, dtype=layer.proj.weight.dtype)  # regions of 3 x 4: 9 down, 7 across
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x)
        qkv = layer.qkv(x)
    assert qkv.dtype == torch.bfloat16
    wanted = []
    for maps in (qkv.float(), qkv):
        q, k, _ = F.avg_pool2d(maps.permute(0, 3, 1, 2), (3, 4)).permute(0, 2, 3, 1).unflatten(3, (3, 2, 16)).unbind(3)
        wanted.append(route_regions(q, k, (9, 7), 4))
    assert torch.equal(routes[0], wanted[0]) and not torch.equal(routes[0], wanted[1])


def test_both_agree_where_regions_divide_the_map():
    one, other = attention(RoutedAttention, 8, 2, 3, 4), attention(FloorRoutedAttention, 8, 2, 3, 4)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(one(x), other(x))


def test_nchw_attention_on_maps_with_fewer_pixels_than_regions():
    layer = attention(FloorRoutedAttention, 8, 2, 7, 16)
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64)  # six regions of one pixel: all attend to all
    q, k, v = layer.qkv(x).unflatten(3, (3, 2, 4)).unbind(3)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).flatten(2)
    want = layer.proj(out + convolved(layer, v.transpose(1, 2).flatten(2), 3, 2))
    torch.testing.assert_close(layer(x), want.unflatten(1, (3, 2)))


@pytest.mark.parametrize("cls", [FullAttention, ValueFullAttention])
def test_full_attention(cls):
    layer = attention(cls, 8, 2)
    assert layer.qkv.bias is None and layer.proj.bias is not None
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x.flatten(1, 2)).chunk(3, -1)
    heads = [t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    beside = convolved(layer, x.flatten(1, 2) if cls is FullAttention else v, 3, 5)
    torch.testing.assert_close(layer(x), layer.proj(out + beside).unflatten(1, (3, 5)))


def test_no_gradient_through_the_routing(monkeypatch):
    model = small("biformer_t")
    x = torch.randn(1, 3, 97, 80, dtype=torch.float64, requires_grad=True)
    routes = []
    route = biformer.route_regions
    monkeypatch.setattr(biformer, "route_regions", lambda *args: routes.append(route(*args)) or routes[-1])
    (free,) = torch.autograd.grad(model(x).sum(), x)
    made = iter(list(routes))
    monkeypatch.setattr(biformer, "route_regions", lambda *args: next(made))
    (fixed,) = torch.autograd.grad(model(x).sum(), x)
    assert len(routes) == 4 and torch.equal(free, fixed)


def test_last_stage_has_eight_heads_in_every_variant():
    for args in (*biformer.VARIANTS.values(), biformer.STL):
        assert args["heads"][3] == 8
        assert all(dim == 32 * heads for dim, heads in zip(args["dims"][:3], args["heads"][:3], strict=True))


@pytest.mark.parametrize("n_win", [8, 16, (4, 6)])
def test_more_regions_for_dense_prediction(n_win):
    """The number of regions has no weights: the same file serves all of them."""
    model, other = small("biformer_t"), small("biformer_t", n_win=n_win)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 128, 96, dtype=torch.float64)
    assert not torch.allclose(model(x), other(x))
    assert other.stages[0].blocks[0].attn.fn.n_win == (n_win if isinstance(n_win, tuple) else (n_win, n_win))


@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw"])
def test_patches_leave_out_what_does_not_fill_them(name):
    model, x = small(name), torch.randn(1, 3, 115, 98, dtype=torch.float64)
    assert torch.equal(model(x), model(x[:, :, :112, :96]))


def test_first_values():
    """As published: linear layers from a normal cut at 2, of deviation 0.02; 1 x 1 convolutions as torch's."""
    for name, normal in (("biformer_t", True), ("biformer_stl", True), ("biformer_stl_nchw", False)):
        torch.manual_seed(0)
        model = bare(name)
        layers = [m for m in model.stages.modules() if isinstance(m, nn.Linear)]
        assert len(layers) == 5 * 4
        for layer in layers:
            bound = layer.in_features**-0.5  # of torch's uniform distribution
            std, bias = (0.02, 0) if normal else (bound / 3**0.5, bound)
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
            assert layer.bias is None or layer.bias.abs().max().item() == pytest.approx(bias, rel=0.15)
        assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.15) and not model.head.fc.bias.any()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n_win": (7, 0)}, r"n_win is \(7, 0\): expected at least 1 region a side"),
        ({"n_win": 3.5}, r"n_win is 3.5: expected at least 1 region a side"),
        ({"topk": (1, 4)}, r"topk is \(1, 4\): expected a number for each of 4 stages but the last"),
        ({"topk": 4}, "topk is 4: expected a number for each of 4 stages but the last"),
        ({"topk": (1, 0, 16)}, "topk is 0: expected regions that a region attends to, 1 or more"),
        ({"topk": (1, 4, 2.5)}, "topk is 2.5: expected regions that a region attends to, 1 or more"),
    ],
)
def test_regions_that_there_are_not(given, says):
    with pytest.raises(ValueError, match=says):
        biformer.BiFormer(**given)


def test_norms_on_features_have_the_published_eps():
    model = create_model("biformer_t", feature_norms=True, device="meta")
    assert {norm.eps for norm in model.feature_norms} == {1e-6}
