"""What `model.checkpoint` and `teacher.checkpoint` name: a file of weights, or the folder of a run."""

from __future__ import annotations

from pathlib import Path

from recipes.config import ConfigError
from recipes.run import find_checkpoint
from recipes.settings import RunError, load_config


def is_run(given: str) -> bool:
    """Whether a folder is named, which must be a run's."""
    return Path(given).is_dir()


def file_of(given: str, weights: str = "auto") -> Path:
    """Of a run's best checkpoint, or its newest where none has been evaluated.

    weights  "auto" those that it measured, "raw", or "ema"

    Raises RunError for a folder that holds no run, for a run without a whole checkpoint, and for weights it lacks.
    """
    load_config(Path(given))
    found = find_checkpoint(Path(given))
    part = {"auto": found.state["weights"], "raw": "model", "ema": "ema"}[weights]
    if not found.has(part):
        why = "it is shared out over several processes" if found.sharded else "train.ema was null"
        raise RunError(f"{found.path} has no file {part}.safetensors, {why}; model.weights=auto takes what it measured")
    return found.path / f"{part}.safetensors"


def check_model(given: str, name: str) -> None:
    """Raises ConfigError where a run trained another model than `name`; tags of weights do not count."""
    own = load_config(Path(given)).model.name
    if own.split(".")[0] != name.split(".")[0]:
        raise ConfigError(f"the run {given} trained {own}, and this is {name}: give model={own}, or another checkpoint")
