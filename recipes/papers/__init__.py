"""How the authors of each family trained: one folder per task, one table per family, resolved by `recipe=paper`.

A table maps a phase to `source`, `published` values, `chosen` values (no source has them) and `models`, each with its
own values; `starts` says which weights training starts from, and `releases` which release of timm's names that is, by
model, if there is one, and, in dense tasks, if it is not the default one; `differs` where sources disagree (the source
of the released weights is followed) and what keys cannot express. Keys are those of the configuration. A new family
needs a table, but no code.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from recipes.config.errors import ConfigError, near


@cache
def tables(task: str = "classify") -> dict[str, dict[str, Any]]:
    """A task's phases: {"maxvit/imagenet1k": {"source": ..., "published": ..., "chosen": ..., "models": ...}}.

    A task of one's own, without a folder, has none.
    """
    found: dict[str, dict[str, Any]] = {}
    folder = files(__package__) / task
    if not folder.is_dir():
        return found
    common = folder / "_common.yaml"  # anchors for all tables of the folder
    anchors = common.read_text("utf-8") if common.is_file() else ""
    for file in sorted((f for f in folder.iterdir() if not f.name.startswith("_")), key=lambda file: file.name):
        phases = OmegaConf.to_container(OmegaConf.create(anchors + file.read_text("utf-8")))
        phases = {phase: table for phase, table in phases.items() if not phase.startswith("_")}
        found |= {f"{file.name.removesuffix('.yaml')}/{phase}": table for phase, table in phases.items()}
    return found


@cache
def unpublished(task: str) -> dict[str, str]:
    """Models of the zoo whose training was never described, with the reason."""
    return _reasons(task, "_unpublished.yaml")


@cache
def left_out(task: str) -> dict[str, str]:
    """Published trainings that no table has, in words, with the reason."""
    return _reasons(task, "_left_out.yaml")


def _reasons(task: str, name: str) -> dict[str, str]:
    file = files(__package__) / task / name
    return OmegaConf.to_container(OmegaConf.create(file.read_text("utf-8"))) if file.is_file() else {}


def phases(model: str, task: str) -> list[str]:
    """The phases published for a model and a task; `recipe=paper` takes the first."""
    model = model.split(".")[0]
    return [phase for phase, table in tables(task).items() if model in table["models"]]


@dataclass(frozen=True)
class Recipe:
    """How a model was trained.

    phase    as named in `tables`
    values   by configuration key
    chosen   the keys whose values no source has
    starts   which weights the training starts from, None if from none
    release  "model.tag" of these weights, None if they were not released or, in dense tasks, are the default ones
    """

    phase: str
    values: dict[str, Any]
    chosen: set[str]
    starts: str | None
    release: str | None


@cache
def recipe(model: str, phase: str | None = None, task: str = "classify") -> Recipe:
    """What `recipe=paper` takes for a model, in its first phase unless one is named.

    Raises ConfigError if nothing, or not that phase, is published for the model.
    """
    model = model.split(".")[0]
    known = phases(model, task)
    if not known:
        models = sorted({name for table in tables(task).values() for name in table["models"]})
        why = f" ({unpublished(task)[model]})" if model in unpublished(task) else ""
        others = f"expected one of {', '.join(models)}" if models else "none is for this task, choose another recipe="
        raise ConfigError(f"recipe=paper has no published recipe for {model}, task={task}{why}: {others}")
    found = next((key for key in known if phase in (None, key, key.split("/")[1])), None)
    if found is None:
        there = ", ".join(known)
        raise ConfigError(f"paper.phase={phase} is not published for {model}{near(phase, known)}: expected {there}")
    table = tables(task)[found]
    chosen, published, own = table["chosen"], table["published"], table["models"][model]
    starts, release = table.get("starts"), table.get("releases", {}).get(model)
    return Recipe(found, chosen | published | own, chosen.keys() - published.keys() - own.keys(), starts, release)


def resolve(key: str, *, _root_: Any) -> Any:
    """The resolver behind ${paper:<key>}."""
    value = recipe(_root_.model.name, _root_.paper.phase, _root_.task.name).values[key]
    return OmegaConf.create(value) if isinstance(value, list) else value
