"""The command that starts us, and its completion from a file of models, fast as torch is never imported here.

eval "$(python train.py -sc install=bash)"      # or fish; zsh reads bash's
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

TABLE = files("recipes.conf") / "models.json"
ROOT = Path(__file__).parents[1]
IN_CLONE = (ROOT / "train.py").is_file() and (ROOT / "eval.py").is_file()  # or among the installed packages


def command(name: str) -> str:
    """How "train" or "eval" is started: by its file in a clone; as a module if there is no file, or it was not used."""
    return f"python {name}.py" if IN_CLONE and _module() is None else f"python -m recipes.{name}"


def typed() -> list[str]:
    """What follows `python` in the command that started this process."""
    module = _module()
    return sys.argv if module is None else ["-m", module, *sys.argv[1:]]


def _module() -> str | None:
    """The module of ours that was started by `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None and spec.name.startswith("recipes.") else None


def answer(name: str) -> None:
    """If a shell asks `name`.py for completion, answer and end the process."""
    if {"-sc", "--shell-completion"} & set(sys.argv[1:]):
        typed = os.environ.get("COMP_LINE", "") + " "
        defaults = (files("recipes.conf") / f"{name}.yaml").read_text("utf-8")
        variants = json.loads(TABLE.read_text("utf-8"))
        # only the keys of the chosen model may be asked for; adding those of all others would take too long
        chosen = [model for model in variants if f"model={model} " in typed or f"- model: {model}\n" in defaults]
        fill_model_group({model: variants[model] if model in chosen else {} for model in variants})
        hydra.main(config_path="pkg://recipes.conf", config_name=name, version_base="1.3")(lambda cfg: None)()
        sys.exit()


def fill_model_group(variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill the configuration group `model`: one option for each variant with its arguments, `timm` and `auto`."""
    store = ConfigStore.instance()
    for name, arguments in variants.items():
        # the size comes from the data unless model.img_size is given
        own = {key: value for key, value in arguments.items() if key != "img_size"}
        store.store(group="model", name=name, node={"name": name, **own}, provider="zoo")
    store.store(group="model", name="timm", node={"name": MISSING}, provider="zoo")
    store.store(group="model", name="auto", node={"name": None}, provider="zoo")


def render() -> str:
    """recipes/conf/models.json: the zoo's table of variants."""
    import zoo

    rows = (f"{json.dumps(name)}: {json.dumps(arguments)}" for name, arguments in zoo.variants().items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    said = "Write recipes/conf/models.json, the zoo's table of variants."
    argparse.ArgumentParser(prog="python -m recipes.shell", description=said).parse_args()
    TABLE.write_text(render(), "utf-8")
