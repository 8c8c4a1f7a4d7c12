"""How the authors of each family trained: one folder per task, one table per family, resolved by `recipe=paper`.

A table maps a phase to `source`, `published` values, `chosen` values (no source has them) and `models`, each with its
own values; `starts` says which weights training starts from, `differs` where sources disagree (the source of the
released weights is followed) and what keys cannot express. Keys are those of the configuration. A new family needs a
table, but no code.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from recipes.config.errors import ConfigError, near


@cache
def tables(task: str = "classify") -> dict[str, dict[str, Any]]:
    """A task's phases: {"maxvit/imagenet1k": {"source": ..., "published": ..., "chosen": ..., "models": ...}}."""
    found = {}
    folder = files(__package__) / task
    common = folder / "_common.yaml"  # anchors for all tables of the folder
    anchors = common.read_text() if common.is_file() else ""
    for file in sorted((f for f in folder.iterdir() if not f.name.startswith("_")), key=lambda file: file.name):
        phases = OmegaConf.to_container(OmegaConf.create(anchors + file.read_text()))
        phases = {phase: table for phase, table in phases.items() if not phase.startswith("_")}
        found |= {f"{file.name.removesuffix('.yaml')}/{phase}": table for phase, table in phases.items()}
    return found


@cache
def unpublished(task: str = "classify") -> dict[str, str]:
    """Models of the zoo whose training was never described, with the reason."""
    file = files(__package__) / task / "_unpublished.yaml"
    return OmegaConf.to_container(OmegaConf.create(file.read_text())) if file.is_file() else {}


def phases(model: str, task: str = "classify") -> list[str]:
    """The phases published for a model and a task; `recipe=paper` takes the first."""
    model = model.split(".")[0]
    return [phase for phase, table in tables(task).items() if model in table["models"]]


def find(model: str, phase: str | None = None, task: str = "classify") -> str:
    """The phase that `recipe=paper` takes for a model, as named in `tables`.

    Raises ConfigError if nothing, or not that phase, is published for the model.
    """
    model = model.split(".")[0]
    known = phases(model, task)
    if not known:
        models = sorted({name for table in tables(task).values() for name in table["models"]})
        why = f" ({unpublished(task)[model]})" if model in unpublished(task) else ""
        raise ConfigError(
            f"recipe=paper has no published recipe for {model}, task={task}{why}: expected one of {', '.join(models)}"
        )
    chosen = next((key for key in known if phase in (None, key, key.split("/")[1])), None)
    if chosen is None:
        there = ", ".join(known)
        raise ConfigError(f"paper.phase={phase} is not published for {model}{near(phase, known)}: expected {there}")
    return chosen


def values(model: str, phase: str | None = None, task: str = "classify") -> dict[str, Any]:
    """Every value of a model's recipe, by configuration key. Raises ConfigError as `find`."""
    table = tables(task)[find(model, phase, task)]
    return table["chosen"] | table["published"] | table["models"][model.split(".")[0]]


def chosen(model: str, phase: str | None = None, task: str = "classify") -> set[str]:
    """The keys whose values no source has. Raises ConfigError as `find`."""
    table = tables(task)[find(model, phase, task)]
    return table["chosen"].keys() - table["published"].keys() - table["models"][model.split(".")[0]].keys()


def starts(model: str, phase: str | None = None, task: str = "classify") -> str | None:
    """Which weights the training starts from, None if from none. Raises ConfigError as `find`."""
    return tables(task)[find(model, phase, task)].get("starts")


def resolve(key: str, *, _root_: Any) -> Any:
    """The resolver behind ${paper:<key>}."""
    value = values(_root_.model.name, _root_.paper.phase, _root_.task.name)[key]
    return OmegaConf.create(value) if isinstance(value, list) else value
