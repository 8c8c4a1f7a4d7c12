"""How the authors of each family trained: a folder a task, a table a family, resolved by `recipe=paper`.

A table maps a phase to `source`, `published` values, `chosen` values (no source has them) and `models`, each with what
is its own. Keys are those of the configuration. A new family adds a table, no code.
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
    for file in sorted((files(__package__) / task).iterdir(), key=lambda file: file.name):
        phases = OmegaConf.to_container(OmegaConf.create(file.read_text()))
        phases.pop("_shared", None)
        found |= {f"{file.name.removesuffix('.yaml')}/{phase}": table for phase, table in phases.items()}
    return found


def phases(model: str, task: str = "classify") -> list[str]:
    """The phases that are published for a model and a task, the one that `recipe=paper` takes first."""
    model = model.split(".")[0]
    return [phase for phase, table in tables(task).items() if model in table["models"]]


def values(model: str, phase: str | None = None, task: str = "classify") -> dict[str, Any]:
    """Every value of a model's published recipe, by configuration key.

    Raises ConfigError if nothing is published for the model, or not that phase.
    """
    model = model.split(".")[0]
    known = phases(model, task)
    if not known:
        models = sorted({name for table in tables(task).values() for name in table["models"]})
        raise ConfigError(
            f"recipe=paper has no published recipe for {model}, task={task}: expected one of {', '.join(models)}"
        )
    chosen = next((key for key in known if phase in (None, key, key.split("/")[1])), None)
    if chosen is None:
        there = ", ".join(known)
        raise ConfigError(f"paper.phase={phase} is not published for {model}{near(phase, known)}: expected {there}")
    table = tables(task)[chosen]
    return table["published"] | table["chosen"] | table["models"][model]


def resolve(key: str, *, _root_: Any) -> Any:
    """The resolver behind ${paper:<key>}."""
    value = values(_root_.model.name, _root_.paper.phase, _root_.task.name)[key]
    return OmegaConf.create(value) if isinstance(value, list) else value
