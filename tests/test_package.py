"""What the packages need, and that they need no more."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from recipes import shell
from recipes.config.help import text as help_text

ROOT = Path(__file__).parents[1]
TRAINING = (
    "hydra",
    "omegaconf",
    "datasets",
    "wandb",
    "sklearn",
    "matplotlib",
    "rich",
    "torchmetrics",
    "pyarrow",
    "pycocotools",
)


def imported(statement, *without):
    """Run `statement` in a new process where importing one of `without` is an error; our packages that it loaded."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without!r}))"
    report = "print([name for name in ('zoo', 'ops', 'recipes') if name in sys.modules])"
    code = f"{blocked}\n{statement}\n{report}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_zoo_needs_torch_torchvision_and_timm():
    statement = "import timm, zoo; timm.create_model('maxvit_t', device='meta')"
    assert imported(statement, *TRAINING, "triton", "onnx", "pytest") == "['zoo', 'ops']"


def test_importing_downloads_nothing():
    statement = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('a connection while importing')\n"
        "socket.socket.connect = refuse\n"
        "import zoo, recipes.data, recipes.config"
    )
    assert imported(statement) == "['zoo', 'ops', 'recipes']"


def test_training_without_its_packages_says_which():
    statement = "try: import recipes\nexcept ModuleNotFoundError as error: assert 'extra `train`{}' in str(error)"
    assert imported(statement.format(""), "hydra") == "[]"
    assert imported(statement.format(", but there is no rich and no torchmetrics: "), "torchmetrics", "rich") == "[]"


def test_digits_without_scikit_learn():
    statement = (
        "from recipes.config import compose\nfrom recipes.data import DataError, build\n"
        "try: build(compose())\nexcept DataError as error: assert 'pip install scikit-learn' in str(error)\n"
        "else: raise AssertionError('read without it')"
    )
    assert imported(statement, "sklearn") == "['zoo', 'ops', 'recipes']"


def started(monkeypatch, module, *arguments):
    """As in a process that was started by `python -m module` with these arguments; None: by a file."""
    spec = module and importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["there/started.py", *arguments])


def test_commands_are_said_as_they_can_be_typed(monkeypatch):
    started(monkeypatch, None, "model=nat_m")
    assert shell.command("train") == "python train.py" and shell.typed() == ["there/started.py", "model=nat_m"]
    started(monkeypatch, "pytest.__main__")
    assert shell.command("eval") == "python eval.py" and "python eval.py -sc install" in help_text("eval")
    started(monkeypatch, "recipes.train", "model=nat_m")
    assert shell.command("eval") == "python -m recipes.eval"
    assert shell.typed() == ["-m", "recipes.train", "model=nat_m"]
    started(monkeypatch, None)
    monkeypatch.setattr(shell, "IN_CLONE", False)
    assert shell.command("train") == "python -m recipes.train"
    assert "python -m recipes.train --cfg job" in help_text("train") and "-sc install" not in help_text("train")


INSTALLED = """
import itertools, runpy, sys, timm, zoo, zoo.table
timm.create_model("maxvit_t", device="meta")
assert "e-" in list(itertools.islice(zoo.table.lines(), 3))[-1]
small = ["model=timm", "model.name=test_resnet", "data.img_size=32", "data.val_fraction=0.05", "data.workers=0"]
for module, *arguments in (["train", *small, "train.steps=2", "name=two"], ["eval", "run=runs/two"]):
    sys.argv[1:] = arguments
    runpy.run_module(f"recipes.{module}", run_name="__main__")
"""


def test_the_wheel_is_enough_to_train_and_evaluate(tmp_path):
    """Outside of the repository; without its dependencies, which are here."""
    pytest.importorskip("setuptools", minversion="77")
    tree, site, elsewhere = (tmp_path / name for name in ("tree", "site", "elsewhere"))
    for name in ("zoo", "ops", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "import setuptools.build_meta as build; build.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    with zipfile.ZipFile(next(tree.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    kept = {path.relative_to(site) for name in ("zoo", "ops", "recipes") for path in (site / name).rglob("*.*")}
    assert kept == {path.relative_to(tree) for name in ("zoo", "ops", "recipes") for path in (tree / name).rglob("*.*")}
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INSTALLED]
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluate with: python -m recipes.eval run=runs/two" in done.stdout
    assert (elsewhere / "runs" / "two" / "eval.json").is_file()
