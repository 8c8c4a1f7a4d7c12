"""The configuration of a run, met with what is typed later to go on with it or to evaluate it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from recipes import config
from recipes.config.checks import base, flat, is_in, task_defaults
from recipes.config.idle import SIDES, WHOLE, is_size_of_images, resized_by
from recipes.data.build import preprocessing
from recipes.log import say
from recipes.provenance import SESSIONS, first_overrides, first_session, sessions

# what may change when a run goes on: without any effect on its result, and with one that is said
FREE = (
    "resume", "name", "out", "logger", "train.keep", "train.log_every", "train.save_every",
    "data.workers", "data.on_bad_image", "data.cache_gb", "data.cache_dir",
)  # fmt: skip
SAID = ("hardware", "data.root", "data.eval_batch_size", "train.eval_every", "train.eval_steps")
LAST_DIGITS = "the result may differ in its last digits"
OTHER_BEST = "the weights of other steps are measured, so that another checkpoint may be the best"
EFFECTS = {  # where it is more than the last digits
    "hardware.amp": "from here on numbers are rounded otherwise, and the result differs",
    "hardware.sync_bn": "on several GPUs batch norms take statistics over other images, and the result differs",
    "train.eval_every": OTHER_BEST,
    "train.eval_steps": OTHER_BEST,
}

# what may be typed beside eval.py's run=: how the command goes, and what is measured and how
COMMAND = ("run", "predict", "predictions", "out", "img_size")
MEASURED = ("data", "hardware", "task.inference", "task.stride", "task.scales", "task.flip")


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message says why and what to do."""


def load_config(folder: Path) -> DictConfig:
    """The resolved configuration of a run. Raises RunError where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder} holds no run: {path} is not there; pass a folder that train.py made (runs/<name>)")
    return OmegaConf.load(path)


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / "config.yaml").is_file() and (folder / SESSIONS).is_file()


def runs_in(out: Path) -> Iterator[Path]:
    """The folders of runs below this one, sorted, however deep their names lie; there are none inside of a run."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir()) if out.is_dir() else ():
        if is_run(folder):
            yield folder
        elif not folder.is_symlink() and not folder.name.startswith("."):
            yield from runs_in(folder)


def config_to_resume(folder: Path, overrides: list[str]) -> DictConfig:
    """The run's configuration with the harmless changes that were asked for; others are refused."""
    stored = load_config(folder)
    asked = _compose(folder, overrides)
    was, now = flat(stored), flat(asked)
    was |= _younger(stored)
    changed = {key: (was.get(key), now.get(key)) for key in was | now if was.get(key) != now.get(key)}
    refused = {key: both for key, both in changed.items() if not is_in(key, FREE + SAID)}
    if refused:
        raise RunError(
            f"{folder} was begun with another configuration, and going on would give a run that is neither:\n  "
            + "\n  ".join(f"{key}: the run has {old}, now {new}" for key, (old, new) in refused.items())
            + f"\n{_way_on(refused, overrides)}, or begin a new run (another name=, no resume)"
        )
    for key, (old, new) in changed.items():
        if is_in(key, SAID):
            say(f"{key} changes from {old} to {new}: {EFFECTS.get(key, LAST_DIGITS)}", "yellow")
    return asked


def _compose(folder: Path, typed: list[str]) -> DictConfig:
    """What the run was begun with, and what is typed now, with the configuration files of both."""
    if not sessions(folder):
        raise RunError(f"{folder} does not say any more what it was begun with: {folder / SESSIONS} has no whole line")
    overrides, searched = _merge([*first_overrides(folder), *_moved(folder)], typed), _searched(folder)
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # Hydra composes one command at a time
    try:
        cfg = config.compose(overrides, typed=typed, searched=searched)
    finally:
        GlobalHydra.instance().hydra = outer
    named = [_key(text) for text in typed]  # keys, or groups that bring theirs
    for key, value in _younger(load_config(folder)).items():
        if not is_in(key, named):
            OmegaConf.update(cfg, key, value)
    return cfg


def _way_on(refused: dict[str, tuple[Any, Any]], typed: list[str]) -> str:
    """What to do about differences to a run, which are typed, or in a recipe that has changed since it was begun."""
    named = [_key(text) for text in typed]
    if "recipe" in named or any(is_in(key, named) for key in refused):
        return "leave these out to go on"
    given = (f"{key}={'null' if old is None else str(old).replace(' ', '')}" for key, (old, _) in refused.items())
    return f"a recipe has changed since; to go on as before give {' '.join(given)}"


def _younger(stored: DictConfig) -> dict[str, Any]:
    """Keys that are younger than a run, with their defaults: so it was begun, whatever its recipe says of them now."""
    task = stored.task.name if "task" in stored else "classify"
    known, defaults = flat(stored), base("train") | task_defaults(task)
    return {key: value for key, value in defaults.items() if key not in known}


def _moved(folder: Path) -> list[str]:
    """Where the data was said to lie the last time that the run went on: it stays there, whoever goes on next."""
    return [text for start in sessions(folder)[1:] for text in start["overrides"] if _key(text) == "data.root"][-1:]


def _searched(folder: Path) -> list[str]:
    """The folders of configuration files of this command, then of the one that began the run.

    Raises RunError where only the latter had any, and they are gone.
    """
    here, there = config.searched(), first_session(folder).get("searched", [])  # older runs lack it
    gone = [path for path in there if not Path(path).is_dir()]
    if gone and not here:
        raise RunError(
            f"{folder} was begun with the configuration files in {gone[0]}, which is not there any more: give "
            "--config-dir=<folder> with where they are now"
        )
    return list(dict.fromkeys([*here, *(path for path in there if path not in gone)]))


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _merge(first: list[str], then: list[str]) -> list[str]:
    return list({_key(text): text for text in [*first, *then]}.values())


def config_to_evaluate(folder: Path, overrides: list[str]) -> DictConfig:
    """The run's configuration with what may be typed for an evaluation: see MEASURED, and img_size=.

    Images of another data set are prepared as the run's were, where nothing else is typed, and it is said so.
    Raises RunError where an override names another model, file or task, the run having its own, or has no effect.
    """
    stored = load_config(folder)
    _refuse_idle(folder, stored, overrides)
    asked = [text for typed in overrides for text in _sized(typed) if is_in(_key(text), MEASURED)]
    if not asked and not _moved(folder):
        return stored
    cfg = _compose(folder, asked)
    sized = [text for text in overrides if _key(text) == "img_size" and _sized(text)]
    if sized and not is_size_of_images(cfg):
        raise RunError(f"{sized[0]} would change nothing: it needs {resized_by(cfg)}")
    if cfg.data.name != stored.data.name:
        _keep_preparation(cfg, stored, {_key(text) for text in asked})
    return cfg


def _refuse_idle(folder: Path, stored: DictConfig, overrides: list[str]) -> None:
    own = [text for text in overrides if is_in(_key(text), ("model", "checkpoint", "weights"))]
    if own:
        raise RunError(f"run={folder} says the model and its weights already; leave out {' '.join(own)}")
    free, task = (*COMMAND, *MEASURED), stored.task.name if "task" in stored else None
    idle = [text for text in overrides if not is_in(_key(text), free) and text != f"task={task}"]
    if idle:
        raise RunError(
            f"run={folder} is measured as it was trained, task={task}: {' '.join(idle)} would change nothing. Leave it "
            f"out; what can be given is {', '.join(free)}"
        )


def _sized(text: str) -> list[str]:
    """`img_size=` as keys of `data`; it goes before the run's own size of evaluated images."""
    if _key(text) != "img_size":
        return [text]
    value = text.partition("=")[2]
    return [] if value == "null" else [f"data.img_size={value}", "data.eval_img_size=null"]


def _keep_preparation(cfg: DictConfig, stored: DictConfig, typed: set[str]) -> None:
    """Let images of another data set reach the model as those did that it was trained on."""
    there, here = _preparation(stored), _preparation(cfg)
    kept = {key: there[key] for key in there if there[key] != here[key] and key not in typed}
    for key, value in kept.items():
        OmegaConf.update(cfg, key, value)
    if kept:
        said = " ".join(f"{key}={'null' if value is None else value}" for key, value in kept.items())
        say(f"data={cfg.data.name} is prepared as the run's images were, {said}; what is typed goes before", "yellow")


def _preparation(cfg: DictConfig) -> dict[str, Any]:
    """What is done to images before the model sees them, by the key of `data` that says it."""
    found = vars(preprocessing(cfg, train=True)).copy()
    found |= {"img_size": found.pop("size"), "eval_img_size": cfg.data.get("eval_img_size")}
    if "task" in cfg and cfg.task.name != "classify":
        found = {key: value for key, value in found.items() if key not in WHOLE}
        found |= {key: cfg.data.get(key) for key in SIDES}  # older runs lack the last two
    return {f"data.{key}": list(value) if isinstance(value, tuple) else value for key, value in found.items()}
