"""Frozen parts of a model: no gradients, and norms and dropout in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from recipes.config import ConfigError


def freeze(model: nn.Module, what: str | Sequence[str] | None) -> list[nn.Module]:
    """Freeze the parameters that `train.freeze` names, and return the modules that are frozen entirely.

    what  "backbone" is all but the classifier, or the backbone of a dense model; else names of parameters or modules,
          with * and ? as wildcards

    Raises ConfigError for a name that the model does not have, and if nothing is left to train.
    """
    if what is None:
        return []
    parameters = dict(model.named_parameters())
    names = (
        backbone_names(model) if what == "backbone" else matching(list(parameters), what, "train.freeze", "backbone")
    )
    for name in names:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"train.freeze={what} leaves nothing of this {type(model).__name__} to train")
    return [module for module in model.modules() if _is_frozen(module)]


def backbone_names(model: nn.Module) -> list[str]:
    """The parameters of a dense model's backbone, or all of a classifier's except those of its last layer."""
    if not hasattr(model, "get_classifier"):
        return [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)  # distilled models have two
    kept = {parameter for head in heads for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if parameter not in kept]


def matching(names: Sequence[str], what: str | Sequence[str], key: str, other: str = "") -> list[str]:
    """Those of a model's parameters that a pattern, or one of several, matches, or a module that they are in.

    key    where they are given, for messages; `other` is what can be given there instead

    Raises ConfigError for a pattern that matches none.
    """
    patterns = [what] if isinstance(what, str) else what
    found = {pattern: [name for name in names if _matches(name, pattern)] for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            there = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            instead = f"; {key}={other} works as well" if other else ""
            raise ConfigError(
                f"{key}: no parameter matches {pattern}; those of the model are {there} and what is in them, such as "
                f"{names[0]}{instead}"
            )
    return [name for name in names if any(name in matched for matched in found.values())]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
