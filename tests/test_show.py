"""What the pictures show is what the model computed: their data against computations that share no code with them."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn

import zoo
from families import PICTURES, SMALL
from ops import neighborhood_attention, route_regions, super_tokens, window_attention
from zoo import show
from zoo.show import attention, command, source, tokens
from zoo.show.field import covered

pytest.importorskip("matplotlib")

SIZE = (71, 86)  # no multiple of a window, cell or region


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 10, **SMALL[name], **kwargs})


def noise(size=SIZE):
    values = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def calls_of(name, op, size=SIZE):
    model = small(name)
    return [call for call in show.record(model, torch.randn(1, 3, *size)) if call.op is op]


def one(name, picture, size=SIZE, **kwargs):
    return show.pictures(small(name), noise(size), img_size=size, only=[picture], **kwargs)[0]


def brute(q, k, allowed, bias=0.0):
    """Weights (heads, keys) of one query (heads, D) to keys (keys, heads, D), of which some are allowed."""
    logits = torch.einsum("hd, jhd -> hj", q, k) * q.shape[-1] ** -0.5 + bias
    return logits.masked_fill(~allowed, float("-inf")).softmax(-1)


NOTES = {
    "a long path": "weights of runs/digits-of-everybody/checkpoints/best-00000044/ema.safetensors",
    "one word": "W" * 150,
    "what looks like a formula": "weights of a$b_c$d.pth, " + "a$x^2$ " * 20,
}


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("name", ["sgformer_b", "davit_t", "maxvit_t"])
def test_no_title_is_cut_off(name, note):
    """Whatever stands above panels and figure lies within the picture, and within the panel's own column."""
    for picture in show.pictures(small(name), noise((32, 96)), img_size=(32, 96), note=NOTES[note], stage=0):
        picture.png()
        figure = picture.figure
        (title,) = (text for text in figure.texts if text.get_text())
        assert NOTES[note].strip() in picture.title
        assert re.sub(r"\s", "", title.get_text()) == re.sub(r"\s", "", picture.title)
        for text in (title, *(ax.title for ax in figure.axes)):
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for one, other in itertools.combinations((ax.title.get_window_extent() for ax in figure.axes), 2):
            assert not one.overlaps(other) or one.width == 0


def test_every_class_has_its_pictures():
    assert PICTURES.keys() == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_pictures(name):
    """All of a family at a size that nothing divides; the model is left as it was."""
    model = small(name).train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = show.pictures(model, noise(), img_size=SIZE, query=(70, 85), note="random weights")
    assert [picture.name for picture in found] == show.names(model) == [*PICTURES[name], "field"]
    for picture in found:
        assert name in picture.title and "random weights" in picture.title and "arXiv:" in picture.caption
        assert picture._repr_png_().startswith(b"\x89PNG")
        assert all(value.isfinite().all() for value in picture.data.values())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", SMALL)
def test_recorded_is_computed(name):
    """The last attention of the recording gives the map that the model itself computes from it."""
    model, x = small(name).eval(), torch.randn(1, 3, *SIZE)
    call = show.record(model, x)[-1]
    seen = {}
    model.get_submodule(call.module).proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(x)
        assert torch.equal(call.again(), call.result)
    if not hasattr(model.get_submodule(call.module), "lepe"):  # which is added before the projection
        torch.testing.assert_close(seen["x"].reshape(*call.result.shape[:3], -1), call.result.flatten(3))


def test_block_and_grid_hold_a_window_of_keys():
    block, grid = (calls_of("maxvit_t", window_attention, (224, 224))[i] for i in (0, 1))
    for call, keys in (
        (block, {(y, x) for y in range(7, 14) for x in range(14, 21)}),
        (grid, {(y, x) for y in range(2, 56, 8) for x in range(1, 56, 8)}),
    ):
        query = (10, 17)
        seen = attention.reach(call, query)
        assert {tuple(place) for place in seen.nonzero().tolist()} == keys
        weights = attention.weights(call, query)
        torch.testing.assert_close(weights.sum((1, 2)), torch.ones(len(weights)))


def test_window_weights():
    """With a bias, a border, and positions outside that take their share."""
    call = calls_of("davit_t", window_attention)[0]
    q, k = call.arguments["q"][0], call.arguments["k"][0]
    height, width = q.shape[:2]
    query = (height - 1, width - 1)
    rows, columns = (torch.arange(n) // 7 == (n - 1) // 7 for n in (height, width))
    inside = (rows[:, None] & columns).flatten()
    beyond = 49 - int(inside.sum())
    assert beyond > 0
    keys = torch.cat([k.flatten(0, 1), call.arguments["outside"][0].expand(beyond, -1, -1)])
    want = brute(q[query], keys, torch.cat([inside, torch.ones(beyond, dtype=torch.bool)]))
    found = attention.weights(call, query)
    torch.testing.assert_close(found.flatten(1), want[:, :-beyond])
    assert (found.sum((1, 2)) < 1).all()


@pytest.mark.parametrize("where", [(0, 0), (20, 13)])
def test_neighborhood_has_all_its_keys(where):
    calls = calls_of("dinat_b", neighborhood_attention, (256, 256))
    for call in calls[:2]:
        dilation = call.arguments["dilation"]
        seen = attention.reach(call, where)
        assert seen.sum() == 49
        rows = seen.any(1).nonzero().flatten()
        assert (rows.diff() == dilation).all() and (rows % dilation == where[0] % dilation).all()
        q, k = call.arguments["q"][0], call.arguments["k"][0]
        steps = torch.stack(torch.meshgrid(*map(torch.arange, k.shape[:2]), indexing="ij")).flatten(1)
        away = (steps - torch.tensor(where)[:, None]) // dilation + 6
        bias = call.arguments["bias"][:, away[0].clamp(0, 12), away[1].clamp(0, 12)]
        want = brute(q[where], k.flatten(0, 1), seen.flatten(), bias)
        torch.testing.assert_close(attention.weights(call, where).flatten(1), want)
    assert {call.arguments["dilation"] for call in calls[:2]} == {1, 8}


def test_routes_are_the_best_regions():
    picture, model = one("biformer_t", "routes", query=(60, 70)), small("biformer_t")
    for call in show.record(model, show.image.as_input(noise(), model)):
        if call.op is not route_regions or call.block:
            continue
        q, k = (call.arguments[name][0].flatten(2) for name in ("q", "k"))  # (H, W, C)
        rows, columns = (side // 7 for side in q.shape[:2])
        token = 60 // (4 * 2**call.stage), 70 // (4 * 2**call.stage)
        parts = [t.unflatten(1, (7, columns)).unflatten(0, (7, rows)).mean((1, 3)).flatten(0, 1) for t in (q, k)]
        score = parts[1] @ parts[0][token[0] // rows * 7 + token[1] // columns]
        routed = picture.data[f"routes_{call.stage}"]
        assert set(routed.tolist()) == set(score.topk(call.arguments["topk"]).indices.tolist())
        assert picture.data[f"reach_{call.stage}"].sum() == len(routed) * rows * columns
        torch.testing.assert_close(picture.data[f"weights_{call.stage}"].sum(), torch.tensor(1.0))


@pytest.mark.parametrize(("name", "picture"), [("biformer_stl", "routes"), ("litv2_s", "halves")])
def test_a_pixel_that_the_map_drops_is_shown_as_its_neighbour(name, picture):
    """Regions of BiFormer's second models are padded: no token of padding is shown."""
    dropped, last = (one(name, picture, query=query, stage=2).data for query in ((70, 85), (63, 79)))
    for key, value in last.items():
        assert torch.equal(dropped[key], value), key


def test_pictures_of_a_model_in_half_precision():
    """A spectrum is computed in float32: there is no Fourier transform in half precision on CPUs."""
    (picture,) = show.pictures(small("litv2_s").bfloat16(), noise(), img_size=SIZE, only=["halves"], stage=2)
    assert picture.data["high_spectrum"].isfinite().all()


def test_runs_of_a_model_in_half_precision():
    """Their numbers and lengths are beyond what half precision tells apart."""
    given = {"img_size": (512, 512), "only": ["significance"]}
    pictures = show.pictures(small("sgformer_b").bfloat16(), noise(), **given)
    data = [picture.data for picture in pictures]
    found = [(of[key], of[key.replace("run", "size")]) for of in data for key in of if key.startswith("run_")]
    assert max(runs.max() for runs, _ in found) > 256
    for runs, sizes in found:
        assert len(runs.unique()) == runs.max() + 1 and torch.equal(runs.flatten().bincount()[runs], sizes)


@pytest.mark.parametrize(("name", "kind", "stage"), [("litv2_s", "halves", 0), ("sgformer_b", "significance", 3)])
def test_a_stage_without_a_picture_has_the_others(name, kind, stage):
    given = {"img_size": SIZE, "stage": stage}
    with pytest.raises(show.ShowError, match=rf"\. Without {kind}: only=\w*,?field$"):
        show.pictures(small(name), noise(), **given)
    (picture,) = show.pictures(small(name), noise(), only="field", **given)
    assert picture.name == "field"


def test_queries_and_images_of_other_types():
    model = small("biformer_t")
    (one_,) = show.pictures(model, noise(), query=np.array([60, 70]), img_size=SIZE, only=["routes"], stage=1)
    assert torch.equal(one_.data["routes_1"], one("biformer_t", "routes", query=(60, 70), stage=1).data["routes_1"])
    for given, said in (
        ({"query": (1, 2, 3)}, "query is"),
        ({"query": (1.5, 2)}, "query is"),
        ({"photo": np.zeros(3)}, "a ndarray: give"),
    ):
        with pytest.raises(show.ShowError, match=said):
            show.pictures(model, **{"photo": noise(), "img_size": SIZE, **given})


def test_significance_is_what_the_next_block_ranks():
    """Tokens of one run are neighbours in rank, and hold as many as one of the layers merges."""
    picture, model = one("sgformer_b", "significance", size=(224, 224)), small("sgformer_b")
    received, run, size = (picture.data[f"{name}_0"] for name in ("significance", "run", "size"))
    assert (run.flatten()[received.flatten().argsort(stable=True)].diff() >= 0).all()
    assert torch.equal(run.flatten().bincount()[run], size)
    lengths = {layer.in_features for layer in model.stages[0].blocks[1].attn.merge}
    assert set(size.unique().tolist()) == lengths == {28, 56, 196}


def test_super_tokens_own_their_pixels():
    call = calls_of("stvit_b", super_tokens)[0]
    found, share = tokens.owners(call)
    (H, W), (h, w) = call.result[1].shape[1:3], call.result[0].shape[1:3]
    torch.testing.assert_close(call.result[1].sum(-1), torch.ones(1, H, W))
    assert share.min() >= 1 / 9 - 1e-6 and share.max() <= 1
    for y, x in ((0, 0), (H - 1, W - 1), (H // 2, W // 3)):
        cells = [(y // 8 + dy, x // 8 + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        a, b = cells[int(call.result[1][0, y, x].argmax())]
        assert found[y, x] == (a * w + b if 0 <= a < h and 0 <= b < w else -1)


def test_global_query_asks_every_window():
    picture = one("gcvit_s", "query", size=(224, 224), query=(100, 50))
    weights = picture.data["weights_0"]
    assert weights.shape == (56, 56)
    torch.testing.assert_close(weights.unfold(0, 7, 7).unfold(1, 7, 7).sum((2, 3)), torch.ones(8, 8))


def test_channels():
    picture, model = one("davit_t", "channels"), small("davit_t")
    x = show.image.as_input(noise(), model)
    call = next(call for call in show.record(model, x) if "channel" in call.op.__name__)
    k, v = (call.arguments[name][0].flatten(0, 1) for name in ("k", "v"))  # (tokens, heads, D)
    want = (torch.einsum("thi, thj -> hij", k, v) * k.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(picture.data["matrix_0"], want)


def test_low_and_high_frequencies():
    picture = one("litv2_s", "halves")
    assert picture.data["reach"].sum() in (1, 2, 4)  # a window of 2 x 2, or what is left of it at a border
    torch.testing.assert_close(picture.data["low_weights"].sum(), torch.tensor(1.0))
    maps = picture.data["weights"].shape
    assert picture.data["high_spectrum"].shape == picture.data["low_spectrum"].shape == maps
    assert picture.data["low_spectrum"].argmax() == maps[0] // 2 * maps[1] + maps[1] // 2


class Convolutions(nn.Module):
    """Three 3 x 3 convolutions: a field of 7 x 7 pixels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))

    def forward_intermediates(self, x, intermediates_only):
        return [self.layers(x)]


def test_field_ends_where_convolutions_do():
    field = show.receptive_field(Convolutions(), torch.randn(2, 3, 21, 30))
    first, last = field.nonzero().amin(0), field.nonzero().amax(0)
    assert first.tolist() == [7, 12] and last.tolist() == [13, 18] and field.max() == 1
    with pytest.raises(show.ShowError, match="stage is 1"):
        show.receptive_field(Convolutions(), torch.randn(1, 3, 21, 30), 1)
    with pytest.raises(show.ShowError, match="forward_intermediates"):
        show.receptive_field(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 21, 30))


def test_influences_of_opposite_signs_do_not_cancel():
    model = Convolutions()
    model.layers = nn.Conv2d(3, 1, (1, 3), padding=(0, 1))
    model.layers.weight.data[0, :, 0] = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
    field = show.receptive_field(model, torch.randn(2, 3, 1, 3))
    assert field[0].tolist() == pytest.approx([1, 0, 2 / 3])


def test_the_least_that_makes_up_most_of_a_field():
    assert covered(torch.ones(10, 10)) == pytest.approx(0.9, abs=0.01)
    assert covered(torch.eye(10)) == pytest.approx(0.09, abs=0.01)


def test_other_models_have_fields():
    model = timm.create_model("resnet10t", num_classes=0)
    assert [picture.name for picture in show.pictures(model, noise(), img_size=64, stage=1)] == ["field"]
    model = timm.create_model("efficientvit_m0")  # it gives the size of its images as one number
    assert show.image.size_of(model) == (224, 224)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": ModelEmaV3,
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper):
    model = small("davit_t").eval()
    wrapped, x = WRAPPERS[wrapper](model), torch.randn(1, 3, *SIZE)
    assert show.names(wrapped) == show.names(model)
    assert_same(show.pictures(wrapped, noise(), img_size=SIZE), show.pictures(model, noise(), img_size=SIZE))
    assert [call.module for call in show.record(wrapped, x)] == [call.module for call in show.record(model, x)]
    assert torch.equal(show.receptive_field(wrapped, x), show.receptive_field(model, x))


def assert_same(found, want):
    assert [picture.title for picture in found] == [picture.title for picture in want]
    for one, other in zip(found, want, strict=True):
        assert one.data.keys() == other.data.keys()
        assert all(torch.equal(value, other.data[key]) for key, value in one.data.items())


def test_models_without_their_last_stages():
    """Their pictures are those of the stages that are there, of a model for features alone too."""
    whole, pruned, features = small("davit_t"), small("davit_t"), small("davit_t", features_only=True, out_indices=(1,))
    pruned.prune_intermediate_layers([1])
    want = {picture.name: picture for picture in show.pictures(whole, noise(), img_size=SIZE)}
    for model in (pruned, features):
        for picture in show.pictures(model, noise(), img_size=SIZE):
            assert {key[-1] for key in picture.data if key[-1].isdigit()} == {"0", "1"}
            assert all(torch.equal(value, want[picture.name].data[key]) for key, value in picture.data.items())
        with pytest.raises(show.ShowError, match="stage is 2: DaViT has stages 0 to 1"):
            show.pictures(model, noise(), img_size=SIZE, only=["field"], stage=2)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("biformer_t", {"query": (71, 0)}, "outside of the image of 71 x 86"),
        ("biformer_t", {"only": ["superpixels"]}, "has no picture superpixels: expected one or more of routes, field"),
        ("biformer_t", {"stage": 3}, "stages with it: 0, 1, 2"),
        ("biformer_t", {"stage": 2, "block": 5}, "block is 5: of such attention, stage 2 has blocks 0 to 1"),
        ("biformer_t", {"head": 9}, "head is 9"),
        ("davit_t", {"head": 3}, "head is 3: .* has heads 0 to"),
        ("litv2_s", {"stage": 3}, "which this picture needs"),
    ],
)
def test_what_is_not_there(name, given, said):
    with pytest.raises(show.ShowError, match=said):
        show.pictures(small(name), noise(), img_size=SIZE, **given)


def test_heads_and_blocks():
    weights = [one("dinat_b", "neighborhoods", stage=2, head=head).data["weights_1_query"] for head in (0, 1, None)]
    assert not torch.allclose(weights[0], weights[1], rtol=0.01)
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2)
    last = one("dinat_b", "neighborhoods", block=-1, stage=0)
    assert [key for key in last.data if "query" in key] == ["weights_8_query", "reach_8_query"]


def test_grey_models():
    model = small("maxvit_t", in_chans=1)
    assert show.image.as_input(noise(), model).shape == (1, 1, *SIZE)


# of a family, what no weight shows or no variant has, and the same as words of a command
OTHERWISE = {
    "biformer_t": ({"topk": [2, 3, 4], "n_win": [3, 4]}, ["topk=[2,3,4]", "n_win=[3,4]"]),
    "davit_t": ({"window_size": 5}, ["window_size=5"]),
    "dinat_b": ({"dilations": "segmentation"}, ["dilations=segmentation"]),
    "gcvit_s": ({"window_size": 3, "rel_pos_bias": False}, ["window_size=3", "rel_pos_bias=false"]),
    "maxvit_t": ({"window_size": 4, "grid_size": [3, 5]}, ["window_size=4", "grid_size=[3,5]"]),
}


def built(*words):
    """The model of a command."""
    args = command.parse([*words])
    return source.build(args.model, args.checkpoint, args.img_size, **args.arguments)[0]


@pytest.mark.parametrize("name", OTHERWISE)
def test_own_weights_are_drawn_with_their_own_arguments(name, tmp_path):
    """From a folder that says them, from its file, and from a file alone, with which they are given."""

    def drawn(model):
        return show.pictures(model, noise(), img_size=SIZE, only=PICTURES[name][:1])

    given, words = OTHERWISE[name]
    model, prepared = small(name, img_size=SIZE, **given), {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    model.pretrained_cfg.update(prepared)
    file, want = zoo.save_for_hf(model, tmp_path / "shared") / "model.safetensors", drawn(model)
    assert_same(drawn(built(f"checkpoint={file.parent}")), want)
    assert_same(drawn(built(f"checkpoint={file}", f"model={name}")), want)

    sizes = [f"{key}={json.dumps(value)}" for key, value in {"num_classes": 10, **SMALL[name]}.items()]
    where = [f"model={name}", f"checkpoint={shutil.copy(file, tmp_path)}", f"img_size={SIZE[0]},{SIZE[1]}"]
    alone = built(*where, *sizes, *words)
    alone.pretrained_cfg.update(prepared)
    assert_same(drawn(alone), want)


def test_the_title_says_whose_weights_are_drawn(monkeypatch):
    given = []
    monkeypatch.setattr(source, "create", lambda name, size, **kwargs: given.append(kwargs["pretrained"]))
    notes = [source.build(name, None, None, **kwargs)[2] for name, kwargs in (
        ("nat_m", {}), ("nat_m.shilabs_in1k", {}), ("nat_m.shilabs_in1k", {"pretrained": False}),
        ("resnet50", {"pretrained": True}),
    )]  # fmt: skip
    assert given == [False, True, False, True]
    assert notes == [source.RANDOM, "weights of nat_m.shilabs_in1k", source.RANDOM, "weights of resnet50"]


def test_random_weights_take_arguments():
    model = built("model=dinats_t", "depths=[1,1]", "dims=[32,64]", "dilations=2")
    (call, _) = (call for call in show.record(model, torch.randn(1, 3, *SIZE)) if call.op is neighborhood_attention)
    assert call.arguments["dilation"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=biformer_t", "topc=3"], "did you mean topk?"),
        (
            ["model=biformer_t", "heads=[1,2]", "other=3"],
            "an argument of biformer_t, dims, depths, heads, topk, n_win,",
        ),
        (["model=vitrpb_s", "window_size=3"], "unknown key window_size: did you mean img_size?"),
        (["model=vitrpb_s", "other=3"], "dim, depths, mlp_ratio, in_chans"),
        (["checkpoint=a.pth", "other=3"], "img_size, stage, block, head, only, or with model= its arguments"),
    ],
)
def test_arguments_that_a_model_does_not_take(words, said, capsys):
    with pytest.raises(SystemExit):
        command.parse(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=biformer_t", "topk=3"], "biformer_t could not be built with .*'topk': 3.*: topk is 3: expected"),
        (["model=resnet10t", "other=[1,null]"], r"resnet10t could not be built with .*'other': \[1, None\]"),
        (["model=nat_m", "img_size=0"], "img_size is .*: expected pixels a side"),
    ],
)
def test_arguments_that_no_model_can_be_built_with(words, said, capsys):
    assert command.main(words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_files_that_do_not_say_what_they_are(tmp_path):
    for name, given, said in (
        ("nat_m", {"depths": (1, 1, 1, 1)}, "name the model with model=, and give the arguments in which it differs"),
        ("nat_m", {}, "is nat_m or dinat_m in layout 'zoo', which .*: name the model, with model="),
        ("gcvit_xxt", {"rel_pos_bias": False}, "give window_size=, with model=gcvit_xxt"),
    ):
        torch.save(timm.create_model(name, **given).state_dict(), tmp_path / "own.pth")
        with pytest.raises(zoo.CheckpointError, match=said):
            source.build(None, str(tmp_path / "own.pth"), None)
