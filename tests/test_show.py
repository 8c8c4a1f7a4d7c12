"""What the pictures show is what the model computed: their data against computations that share no code with them."""

import ast
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import zoo
from families import SMALL
from ops import neighborhood_attention, route_regions, super_tokens, window_attention
from zoo import show
from zoo.show import attention, command, families, source, tokens

pytest.importorskip("matplotlib")

# pictures of each class, beside the field that any model has
NAMES = {
    "maxvit_t": ["axes"],
    "maxvit_t_tv": ["axes"],
    "gcvit_s": ["query"],
    "davit_t": ["windows", "channels"],
    "biformer_t": ["routes"],
    "biformer_stl": ["routes"],
    "biformer_stl_nchw": ["routes"],
    "stvit_b": ["superpixels"],
    "sgformer_b": ["significance"],
    "litv2_s": ["halves"],
    "dinat_b": ["neighborhoods"],
    "dinats_t": ["neighborhoods"],
    "dinat_iso_s": ["neighborhoods"],
    "vitrpb_s": ["windows"],
}
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


def brute(q, k, allowed, bias=0.0, scale=None):
    """Weights (heads, keys) of one query (heads, D) to keys (keys, heads, D), of which some are allowed."""
    logits = torch.einsum("hd, jhd -> hj", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
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
    assert NAMES.keys() == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_pictures(name):
    """All of a family at a size that nothing divides; the model is left as it was."""
    model = small(name).train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = show.pictures(model, noise(), img_size=SIZE, query=(70, 85), note="random weights")
    assert [picture.name for picture in found] == show.names(model) == [*NAMES[name], "field"]
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


def test_other_models_have_fields():
    model = timm.create_model("resnet10t", num_classes=0)
    assert [picture.name for picture in show.pictures(model, noise(), img_size=64, stage=1)] == ["field"]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("biformer_t", {"query": (71, 0)}, "outside of the image of 71 x 86"),
        ("biformer_t", {"only": ["superpixels"]}, "has no picture superpixels: expected some of routes, field"),
        ("biformer_t", {"stage": 3}, "stages that have: 0, 1, 2"),
        ("biformer_t", {"stage": 2, "block": 5}, "2 such blocks, 0 to 1"),
        ("biformer_t", {"head": 9}, "head is 9"),
        ("davit_t", {"head": 3}, "0 to 1|there are"),
        ("litv2_s", {"stage": 3}, "HiLo shares them"),
    ],
)
def test_what_is_not_there(name, given, said):
    with pytest.raises(show.ShowError, match=said):
        show.pictures(small(name), noise(), img_size=SIZE, **given)


def test_heads_and_blocks():
    both = [one("dinat_b", "neighborhoods", head=head).data["weights_1_query"] for head in (0, None)]
    assert both[0].shape == both[1].shape
    last = one("dinat_b", "neighborhoods", block=-1, stage=0)
    assert [key for key in last.data if "query" in key] == ["weights_8_query", "reach_8_query"]


def test_grey_models():
    model = small("maxvit_t", in_chans=1)
    assert show.image.as_input(noise(), model).shape == (1, 1, *SIZE)


def run(capsys, *settings):
    status = command.main([*settings])
    return status, capsys.readouterr()


def test_command(tmp_path, capsys):
    noise((70, 90)).save(tmp_path / "cat.png")
    out = tmp_path / "pictures"
    given = ("model=nat_m", f"image={tmp_path / 'cat.png'}", f"out={out}", "img_size=64", "query=10,20", "stage=1")
    status, said = run(capsys, *given, "only=neighborhoods")
    assert status == 0 and f"written: {out / 'nat_m-neighborhoods.png'}" in said.out and "2209.15001" in said.out
    assert Image.open(out / "nat_m-neighborhoods.png").format == "PNG"


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_own_checkpoint(tmp_path, prefix):
    """A run's classifier, or the backbone of its segmenter, is recognised."""
    trained = timm.create_model("gcvit_xxt", num_classes=10)
    state = {f"{prefix}{key}": value for key, value in trained.state_dict().items()}
    if prefix:
        state["head.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "own.pth")
    model, name, note = source.build(None, str(tmp_path / "own.pth"), (64, 64))
    assert name == "gcvit_xxt" and note.endswith("/own.pth") and model.img_size == (64, 64)
    assert torch.equal(model.stem.conv1.weight, trained.stem.conv1.weight)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model=biformer_x"], "no model is called biformer_x: did you mean biformer_"),
        (["model=nat_m", "image=nowhere.png"], "there is no image nowhere.png"),
        (["model=nat_m", f"image={__file__}"], "cannot be read as an image"),
        (["checkpoint=nowhere.pth"], "nowhere.pth"),
        (["model=nat_m", "only=routes", "img_size=64"], "has no picture routes"),
    ],
)
def test_command_says_what_is_wrong(settings, said, capsys):
    status, found = run(capsys, *settings)
    assert status == 2 and said in found.err and not found.out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "give model=NAME"),
        (["model=nat_m", "qery=1,2"], "did you mean query?"),
        (["model=nat_m", "query=1"], "expected 2 numbers"),
        (["model=nat_m", "stage=last"], "expected a number"),
        (["nat_m"], "expected KEY=VALUE"),
    ],
)
def test_arguments(settings, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.parse(settings)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_defaults():
    args = command.parse(["model=stvit_s", "img_size=256,320"])
    assert (args.image, args.out, args.block, args.img_size, args.stage) == ("flower", "inside", 0, (256, 320), None)


def test_photographs_are_there():
    pytest.importorskip("sklearn")
    assert show.photograph("flower").size == show.photograph("china").size == (640, 427)
    assert zoo.show is show


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/inside.md").read_text()
CELLS = json.loads((ROOT / "docs/inside.ipynb").read_text())["cells"]


def value_of(cell, names):
    """Run a cell of a notebook; what its last line is worth, if it is an expression."""
    body = ast.parse(cell).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "inside.ipynb", "exec"), names)
    return None if last is None else eval(compile(last, "inside.ipynb", "eval"), names)


def test_notebook(capsys):
    """From top to bottom; three of its cells are worth a picture."""
    pytest.importorskip("sklearn")
    names = {}
    values = [value_of("".join(cell["source"]), names) for cell in CELLS if cell["cell_type"] == "code"]
    assert sum(isinstance(value, show.Picture) for value in values) == 3
    assert "routed_attention" in capsys.readouterr().out


def test_page_has_every_picture():
    commands = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("python -m zoo.show")]
    asked = [args for args in (command.parse(words[3:]) for words in commands) if args.model in zoo.variants()]
    drawn = {(zoo.registry.class_of(args.model), view) for args in asked for view in args.only or ()}
    wanted = {(cls, view.name) for cls, views in families.VIEWS.items() for view in views}
    alike = {zoo.dinats.Isotropic, zoo.dinats.VitRPB}  # the pictures are those of DiNAT, and one window
    assert {pair for pair in wanted if pair[0] not in alike} <= drawn


def test_images_of_the_page():
    used = set(re.findall(r"\]\((images/[\w.-]+)\)", PAGE))
    files = {f"images/{path.name}": path.stat().st_size for path in (ROOT / "docs/images").glob("inside-*.png")}
    assert used == files.keys() and len(used) >= 10
    assert max(files.values()) < 150_000 and sum(files.values()) < 2_000_000
    assert len(re.findall(r"\]\(docs/images/inside-[\w.-]+\)", (ROOT / "README.md").read_text())) == 4


def test_the_help_has_a_line_for_every_key():
    said = re.findall(r"^(\w+)  +\S", command.__doc__, re.M)
    assert sorted(said) == sorted(command.KEYS)
