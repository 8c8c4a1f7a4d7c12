"""The configuration of a run, met with what is typed later to go on with it or to evaluate it."""

from __future__ import annotations

from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from recipes import config
from recipes.config.checks import base, flat, task_defaults
from recipes.log import say
from recipes.provenance import first_overrides

# what may change when a run goes on: without any effect on its result, and with one in the last digits
FREE = (
    "resume", "name", "out", "logger", "train.keep", "train.log_every", "train.save_every",
    "data.workers", "data.on_bad_image", "data.cache_gb", "data.cache_dir",
)  # fmt: skip
SAID = ("hardware", "data.root", "data.eval_batch_size", "train.eval_every", "train.eval_steps")


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message says why and what to do."""


def load_config(folder: Path) -> DictConfig:
    """The resolved configuration of a run. Raises RunError where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder} holds no run: {path} is not there; pass a folder that train.py made (runs/<name>)")
    return OmegaConf.load(path)


def config_to_resume(folder: Path, overrides: list[str]) -> DictConfig:
    """The run's configuration with the harmless changes that were asked for; others are refused."""
    stored = load_config(folder)
    asked = _compose(_merge(first_overrides(folder), overrides))
    was, now = flat(stored), flat(asked)
    defaults = base("train") | task_defaults(stored.task.name)
    was |= {key: defaults[key] for key in defaults if key not in was}  # keys that are younger than the run
    changed = {key: (was.get(key), now.get(key)) for key in was | now if was.get(key) != now.get(key)}
    lines = [
        f"{key}: the run has {old}, now {new}" for key, (old, new) in changed.items() if not is_in(key, FREE + SAID)
    ]
    if lines:
        raise RunError(
            f"{folder} was begun with another configuration, and going on would give a run that is neither:\n  "
            + "\n  ".join(lines)
            + "\nleave these out to go on, or begin a new run (another name=, no resume)"
        )
    for key, (old, new) in changed.items():
        if is_in(key, SAID):
            say(f"{key} changes from {old} to {new}: the result may differ in its last digits", "yellow")
    return asked


def _compose(overrides: list[str]) -> DictConfig:
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # Hydra composes one command at a time
    try:
        return config.compose(overrides)
    finally:
        GlobalHydra.instance().hydra = outer


def _merge(first: list[str], then: list[str]) -> list[str]:
    return list({text.split("=")[0].lstrip("+~"): text for text in [*first, *then]}.values())


def is_in(key: str, groups: tuple[str, ...]) -> bool:
    """Whether a key is one of these or lies in one of them."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def config_to_evaluate(folder: Path, overrides: list[str]) -> DictConfig:
    """The run's configuration with the `data` and `hardware` overrides of an evaluation.

    Raises RunError where an override names another model or file: the run has its own.
    """
    stored = load_config(folder)
    own = [text for text in overrides if text.split("=")[0].split(".")[0] in ("model", "checkpoint", "weights")]
    if own:
        raise RunError(f"run={folder} says the model and its weights already; leave out {' '.join(own)}")
    asked = [text for text in overrides if text.split("=")[0].split(".")[0] in ("data", "hardware")]
    return _compose(_merge(first_overrides(folder), asked)) if asked else stored
