"""The documents say what is true: tables are rendered from their data, examples run, commands compose."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from torch.distributed.run import get_args_parser

import zoo
from recipes import config
from zoo import table
from zoo.published import DIFFERS, GFLOPS
from zoo.releases import RELEASES, UNRELEASED, render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    return [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines() if line]


def test_checkpoints_are_rendered_from_the_table():
    assert (ROOT / "checkpoints.md").read_text() == render(RELEASES, UNRELEASED), "run `make docs`"


def rows():
    lines = README.partition(table.BEGIN)[2].partition(table.END)[0].splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def test_table_has_every_model():
    assert list(rows()) == list(zoo.variants()), "run `make docs`"


@pytest.mark.parametrize("name", [n for n in zoo.variants() if n.endswith("_t") or n.endswith("_tv")])
def test_table_rows(name):
    errors = json.loads(table.GOLDEN.read_text())["errors"]
    assert rows()[name] + "\n" == table.row(name, errors), "run `make docs`"


@pytest.mark.slow
def test_whole_table():
    assert table.insert(README, table.render()) == README, "run `make docs`"


def apart(name):
    """Whether a variant's cost is more than 2 % from what the authors print."""
    return abs(table.gflops(name) / GFLOPS[name] - 1) >= 0.02


def test_cost_is_as_printed():
    assert not [name for name in zoo.variants() if name.endswith(("_t", "_tv")) and apart(name)]


@pytest.mark.slow
def test_cost_of_every_variant():
    """Those that are apart, and no others, are named with the reason."""
    assert {name for name in GFLOPS if apart(name)} == DIFFERS.keys()


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_examples(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"maxvit_t-bc5ab103.pth": "maxvit_t_tv"}
    for name, model in files.items():
        layout = zoo.checkpoint.layouts_of(zoo.registry.class_of(model))[0]
        torch.save(layout.to_theirs(timm.create_model(model).state_dict()), name)

    def from_hub(repository, name, **kwargs):
        torch.save(timm.create_model("maxvit_t").state_dict(), "hub.pth")
        return "hub.pth"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_hub)
    exec(compile(blocks("python")[index], "README.md", "exec"), {})


MODULES = [command for command in commands() if command[:2] == ["python", "-m"] and command[2] != "recipes.data"]


@pytest.mark.parametrize("command", MODULES, ids=" ".join)
def test_module_commands_are_understood(command):
    _, _, module, *arguments = command
    given = vars(importlib.import_module(module).parse(arguments))
    values = {text.partition("=")[2] or text for text in arguments if not text.startswith("--")}
    assert values <= set(flattened(given.values()))


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


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "torchrun"], ids=" ".join)
def test_torchrun_understands(command):
    given = get_args_parser().parse_args(command[1:])
    cfg = config.compose(given.training_script_args, name=given.training_script.removesuffix(".py"))
    assert (cfg.model.name or cfg.run or cfg.checkpoint) and int(given.nproc_per_node) == 8


def test_no_command_is_left_out():
    assert {c[0] for c in commands()} == {"pip", "python", "torchrun"}
    assert len(commands()) >= 9
