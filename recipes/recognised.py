"""How a recognised file was built: the arguments that a model's configuration leaves open, and those that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from zoo.recognise import Recognition

WINDOWS = ("img_size", "window_size")  # arguments that both determine a model's windows


def is_asked(model: DictConfig, key: str, own: Mapping[str, Any]) -> bool:
    """Whether a model's configuration sets an argument, or one equivalent to it, to a value other than its variant's
    `own`.
    """
    same = WINDOWS if key in WINDOWS else (key,)
    return any(model.get(other) not in (None, own.get(other)) for other in same)


def left_open(model: DictConfig, arguments: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a file's arguments for which the configuration does not ask for another value."""
    return {key: value for key, value in arguments.items() if not is_asked(model, key, own)}


def is_built_with(model: DictConfig, arguments: Mapping[str, Any]) -> bool:
    """Whether a model's configuration asks for no other value of these arguments; for another size it may."""
    return all(model.get(key) in (None, value) for key, value in arguments.items() if key != "img_size")


def lacking(model: DictConfig, found: Recognition, variant: str, what: str) -> str | None:
    """The arguments of `variant` that neither `what`, which is such a model, shows nor the configuration sets, as a
    message; None if there are none.
    """
    missing = [typed(model, key) for key in found.missing_args(variant) if model.get(key) is None]
    return f"{what} is {found.message}, here as {' '.join(missing)}" if missing else None


def typed(model: DictConfig, key: str) -> str:
    """How an argument of the model is typed on the command line: with a plus if the configuration lacks it."""
    return f"{'' if key in model else '+'}model.{key}="
