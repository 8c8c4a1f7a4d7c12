"""The documents say what is true: tables are rendered from their data, examples run, commands compose."""

import importlib
import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

import zoo
from pages import ROOT, everywhere
from recipes import config
from recipes.papers.render import render as recipes_page
from zoo import table
from zoo.costs import DIFFERS, GFLOPS
from zoo.heads import segmenter
from zoo.releases import RELEASES, UNRELEASED, render

MODELS = (ROOT / "docs" / "models.md").read_text()
COUNT = "run `python -m zoo.table docs/models.md`"


def commands():
    """Every command of the pages, once."""
    return [list(words) for words in dict.fromkeys(tuple(c) for b in everywhere("bash") for c in b.commands())]


# those of a page that is run from top to bottom, marked so, stand on what comes before them
EXAMPLES = [block for block in everywhere("python") if not block.how]


def test_checkpoints_are_rendered_from_the_table():
    assert (ROOT / "checkpoints.md").read_text() == render(RELEASES, UNRELEASED), "run `make docs`"


def test_recipes_are_rendered_from_the_tables():
    assert (ROOT / "docs" / "recipes.md").read_text() == recipes_page(), "run `make docs`"


def rows():
    lines = table.between(MODELS).splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def test_table_has_every_model():
    assert list(rows()) == list(zoo.variants()), COUNT


@pytest.mark.parametrize("name", [n for n in zoo.variants() if n.endswith("_t") or n.endswith("_tv")])
def test_table_rows(name):
    errors = json.loads(table.GOLDEN.read_text())["errors"]
    assert rows().get(name, "") + "\n" == table.row(name, errors), COUNT


@pytest.mark.slow
def test_whole_table():
    assert table.insert(MODELS, table.render()) == MODELS, "run `make docs`"


@pytest.mark.parametrize("text, said", [(None, "No such file"), ("no table", "expected the lines <!-- models -->")])
def test_a_page_without_a_place_for_the_table(tmp_path, monkeypatch, text, said):
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    monkeypatch.setattr(sys, "argv", ["table", str(page)])
    monkeypatch.delitem(sys.modules, "zoo.table")
    with pytest.raises(SystemExit, match=f"^{re.escape(str(page))}: .*{said}"):
        runpy.run_module("zoo.table", run_name="__main__")


def test_cost_is_as_printed():
    """Variants that are 2 % or more from what the authors print, and no others, are named with the reason."""
    counted = {name: float(line.split("|")[4]) for name, line in rows().items()}
    assert {name for name, printed in GFLOPS.items() if abs(counted[name] / printed - 1) >= 0.02} == DIFFERS.keys()


@pytest.mark.parametrize("size", [384, 512])
def test_cost_of_a_port_that_looks_positions_up_by_products(size):
    """A one-hot matrix for the rows of a table of positions and one for its columns, in every attention of MaxViT-T."""
    name, window, heads = f"maxvit_t_{size}", size // 32, 2 * (2 * 2 + 2 * 4 + 5 * 8 + 2 * 16)
    side, tokens = 2 * window - 1, window**2
    lookup = heads * (side * side * tokens + side * tokens**2) / 1e9
    port = table.gflops(f"maxvit_tiny_tf_{size}")
    assert port == pytest.approx(table.gflops(name) + lookup, abs=1e-6) and abs(port / GFLOPS[name] - 1) < 0.02
    assert "one-hot" in DIFFERS[name] and f"{port:.2f}" in MODELS


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.page)
def test_python_examples(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files_for(block.text)

    def from_hub(repository, name, **kwargs):
        torch.save(timm.create_model("maxvit_t").state_dict(), "hub.pth")
        return "hub.pth"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_hub)
    monkeypatch.setattr("zoo.fetch._from_url", lambda url, sha256, cache_dir: Path("maxvit_t-bc5ab103.pth"))
    exec(compile(block.text, block.page, "exec"), {})
    if "timm.create_model(" in block.text:  # this process has registered the models already
        assert re.search(r"^(import|from) zoo\b", block.text, re.M), "a reader's process does not know our models"


def test_quick_start_loads_what_its_run_was_measured_by():
    page, cfg = (ROOT / "docs" / "quickstart.md").read_text(), config.compose(["model=maxvit_t", "name=first"])
    measured = "ema" if cfg.train.ema and cfg.train.ema_evaluated else "model"
    assert re.findall(r'glob\("best-\*/(\w+)\.safetensors"\)', page) == [measured]


# files that examples read: the name -> how to make a model that such a file is of
FILES = {
    "maxvit_t-bc5ab103.pth": partial(timm.create_model, "maxvit_t_tv"),
    "biformer_tiny_best.pth": partial(timm.create_model, "biformer_t"),
    "litv2_s_fpn_r50_512x512_80k_ade20k.pth": partial(segmenter, "litv2_s", 150, head="semantic_fpn"),
    "best-*/ema.safetensors": partial(timm.create_model, "maxvit_t", num_classes=10, img_size=64),
}


def files_for(text):
    """Write the files that an example reads; authors' files in their names, as far as one class has them."""
    if "maxvit_t_tv.tv_in1k" in text:
        text += "maxvit_t-bc5ab103.pth"  # what is downloaded for that name
    for name, make in FILES.items():
        if name in text and "*" in name:
            folder = Path("runs/first/checkpoints/best-00000002")
            folder.mkdir(parents=True)
            save_file(make().state_dict(), folder / Path(name).name)
        elif name in text:
            model = make()
            state = model.state_dict()
            if isinstance(model, zoo.Backbone):
                state = zoo.checkpoint.layouts_of(type(model))[0].to_theirs(state)
            torch.save(state, name)


MODULES = [command for command in commands() if command[:2] == ["python", "-m"] and command[2] != "recipes.data"]


PARSERS = {"recipes.data": "recipes.data.__main__", **{name: f"{name}.command" for name in ("zoo.convert", "zoo.show")}}


def parser_of(module):
    """What parses the arguments of `python -m <module>`."""
    return importlib.import_module(PARSERS.get(module, module)).parse


@pytest.mark.parametrize("command", MODULES, ids=" ".join)
def test_module_commands_are_understood(command):
    _, _, module, *arguments = command
    given = vars(parser_of(module)(arguments))
    understood = set(flattened(given.values()))  # a command that composes a configuration takes key=value as it is
    texts = [text for text in arguments if not text.startswith("--")]
    assert all(text in understood or text.partition("=")[2] in understood for text in texts)


@pytest.mark.parametrize("module", sorted({c[2] for c in commands() if c[:2] == ["python", "-m"]}))
def test_module_commands_have_help(module, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_of(module)(["--help"])
    assert ended.value.code == 0 and f"usage: python -m {module}" in capsys.readouterr().out


def flattened(values):
    for value in values:
        yield ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        yield from map(str, value if isinstance(value, list) else ())


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "python" and c not in MODULES], ids=" ".join)
def test_commands_compose(command):
    if "hydra/launcher=slurm" in command:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if "recipes.data" in command:  # takes what train.py takes
        command = ["python", "train.py", *command[3:]]
    _, program, *overrides = [text for text in command if text != "-m"]
    if "-m" in command:  # a sweep: its first run
        overrides = [text.split(",")[0] for text in overrides]
    cfg = config.compose(overrides, name=program.removesuffix(".py"))
    assert cfg.model.name or cfg.run or cfg.checkpoint


def test_a_name_is_given_to_one_run():
    """Else who types page after page is refused the second, and the commands behind it read the first."""
    runs = {}
    for command in commands():
        given = dict(text.split("=", 1) for text in command if "=" in text)
        if "train.py" in command and "name" in given:
            runs.setdefault(given["name"], set()).add((given["model"], given.get("task", "classify")))
    assert runs and {name: of for name, of in runs.items() if len(of) > 1} == {}


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "torchrun"], ids=" ".join)
def test_torchrun_understands(command):
    given = get_args_parser().parse_args(command[1:])
    cfg = config.compose(given.training_script_args, name=given.training_script.removesuffix(".py"))
    assert (cfg.model.name or cfg.run or cfg.checkpoint) and int(given.nproc_per_node) == 8


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "pip"], ids=" ".join)
def test_extras_exist(command):
    assert command[:3] == ["pip", "install", "-e"] and command[4:] in ([], ["-c", "constraints.txt"])
    name = re.fullmatch(r"\.\[(\w+)\]", command[3])[1]
    assert f"\n{name} = [" in (ROOT / "pyproject.toml").read_text()


def test_targets_exist():
    targets = {command[1] for command in commands() if command[0] == "make"}
    assert targets and targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_repository_lead_somewhere(name):
    """Those of the site's pages are held by its strict build."""
    links = re.findall(r"\]\(([^()#:\s]+)(?:#[^()\s]*)?\)", (ROOT / name).read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_models_are_counted():
    counted = re.search(r"\[(\d+) models\]\(docs/models\.md\)", (ROOT / "README.md").read_text())
    assert int(counted[1]) == len(zoo.variants()), "the README says how many models there are"


def test_every_page_is_reached_from_the_readme():
    """All but what the pages of families, ops and additions lead to."""
    text = (ROOT / "README.md").read_text()
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert not [page for page in pages if f"({page})" not in text]


def test_no_command_is_left_out():
    assert {c[0] for c in commands()} == {"make", "pip", "python", "torchrun"}
    assert len(commands()) >= 9
