"""config=FILE on the command line: every key of a configuration that was printed, or that a run has kept."""

from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from recipes.config import checks
from recipes.config.errors import ConfigError
from recipes.config.quoting import quote

KEY = "config="
OWN = ("name", "out", "resume")  # of one run; the next has its own


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with `config=FILE` written out as overrides, before the others, which beat them.

    Raises ConfigError for a file that is not there or holds no configuration, and for an option of a group beside it:
    the file has a value for every key, so that a recipe would change nothing, and a model would be mixed with another.
    """
    found = [override for text in arguments if text.startswith(KEY) for override in _overrides(text[len(KEY) :])]
    others = [text for text in arguments if not text.startswith(KEY)]
    chosen = [text for text in others if _group(text) in checks.groups()]
    if found and chosen:
        raise ConfigError(
            f"{KEY} gives every key already, those of {' and '.join(_group(text) for text in chosen)} too: leave out "
            f"{' '.join(chosen)}, and give the keys that are to change; or leave out {KEY}"
        )
    return [*found, *others]


def _group(text: str) -> str:
    """What stands before the sign of equality."""
    return text.partition("=")[0].lstrip("+")


def _overrides(file: str) -> list[str]:
    try:
        cfg = OmegaConf.load(file)
        model = cfg.model.name
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(
            f"{KEY}{file} is no configuration: {error}; give a run's config.yaml or what --cfg job printed"
        ) from error
    group = model if model in checks.options("model") else "timm"
    task = OmegaConf.select(cfg, "task.name")  # a group has keys that another lacks
    groups = [f"model={group}", *([f"task={task}"] if task in checks.options("task") else [])]
    return [*groups, *(_override(key, value) for key, value in checks.flat(cfg).items() if key not in OWN)]


def _override(key: str, value: Any) -> str:
    return f"++{quote(key, value)}" if isinstance(value, str) else f"++{key}={written(value)}"


def written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return quote("key", value).removeprefix("key=")
    return "null" if value is None else str(value).lower()  # True, False, and numbers: 1e-05, inf
