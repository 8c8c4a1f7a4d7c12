"""`python -m zoo.show` as its users meet it, and the page and the notebook that its pictures stand in."""

import ast
import json
import re
import shlex

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from children import closed
from pages import ROOT
from test_show import noise
from zoo import export, show
from zoo.show import command, families, source
from zoo.show.image import load


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
        (["model=nat_m", "image=/dev/zero"], "there is no image /dev/zero: give a file"),
        (["model=test_vit", "img_size=100,130"], "VisionTransformer takes no images of 100 x 130: Input height (100)"),
        (["model=litv2_s_a00", "only=halves", "img_size=64"], "has no picture halves: expected one or more of field"),
        (["model=nat_m.nobody"], "nat_m has no weights with that tag: nat_m.nobody"),
        (["checkpoint=nowhere.pth"], "nowhere.pth"),
        (["model=nat_m", "only=routes", "img_size=64"], "has no picture routes"),
    ],
)
def test_command_says_what_is_wrong(settings, said, capsys):
    status, found = run(capsys, *settings)
    assert status == 2 and said in found.err and not found.out


def test_images_that_may_not_be_read(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for path in (tmp_path, tmp_path / "x.png"):
        with closed(path):
            status, found = run(capsys, "model=nat_m", f"image={tmp_path / 'x.png'}")
        assert status == 2 and f"{tmp_path / 'x.png'} " in found.err and "Permission denied" in found.err


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "nat_m.shilabs_in1k"])
def test_weights_that_cannot_be_downloaded(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: fail())

    def fail():
        raise OSError("no network")

    for main, given in ((command.main, [f"model={name}"]), (export.main, [name, str(tmp_path / "out.pt2")])):
        assert main(given) == 2
        assert "could not" in (said := capsys.readouterr().err) and "download" in said


@pytest.mark.parametrize(
    ("pixel", "want"),
    [((9, 8, 7), (9, 8, 7)), (np.uint16(30000), (117, 117, 117)), ((9, 9, 9, 0), (255, 255, 255))],
)
def test_images_are_those_that_a_model_is_trained_on(tmp_path, pixel, want):
    """Wide greys are scaled, and what is transparent is white."""
    values = np.full((4, 4, *np.shape(pixel)), pixel, getattr(pixel, "dtype", np.uint8))
    Image.fromarray(values).save(tmp_path / "image.png")
    for given in (tmp_path / "image.png", Image.fromarray(values)):
        assert load(given).getpixel((1, 1)) == want


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "give model=NAME"),
        (["model=nat_m", "qery=1,2"], "did you mean query?"),
        (["model=davit_t", "model=nat_m"], "model= is given more than once"),
        (["model=biformer_t", "n_win=5", "stage=1", "n_win=7"], "n_win= is given more than once"),
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
    alike = {zoo.dinats.Isotropic, zoo.dinats.ViTRPB}  # the pictures are those of DiNAT, and one window
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
