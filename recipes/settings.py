"""The configuration of a run, combined with what is typed later to resume or to evaluate it."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from recipes import config, shell
from recipes.config.checks import is_in
from recipes.config.contents import base, flat, hardware_defaults, options, task_defaults
from recipes.config.idle import SIDES, WHOLE, is_size_of_images, needed, needed_to_evaluate, resized_by
from recipes.config.quoting import key_of, written
from recipes.config.ranges import check_range
from recipes.console import note, say
from recipes.data.build import preprocessing
from recipes.errors import RunError
from recipes.provenance import SESSIONS, first_overrides, first_session, sessions
from zoo.files import entries, is_absent, unreadable

# what may change when a run is resumed: without any effect on its result, and with one that is reported
FREE = (
    "resume", "name", "out", "logger", "train.keep", "train.log_every", "train.save_every",
    "data.workers", "data.on_bad_image", "data.cache_gb", "data.cache_dir",
)  # fmt: skip
LASTING = ("data.root", "data.on_bad_image")  # what is typed to resume a run holds for its evaluations too
REPORTED = (
    "hardware", "data.root", "data.eval_batch_size",
    "train.eval_every", "train.eval_steps", "train.grad_checkpointing",
)  # fmt: skip
LAST_DIGITS = "the result may differ in its last digits"
TWICE = "batch norms of timm's models record their statistics twice with it"
OTHER_BEST = "the weights of other steps are evaluated, so that another checkpoint may be the best"
EFFECTS = {  # where it is more than the last digits
    "hardware.amp": "from here on numbers are rounded differently, and the result differs",
    "hardware.sync_bn": "on several GPUs batch norms take statistics over other images, and the result differs",
    "train.eval_every": OTHER_BEST,
    "train.eval_steps": OTHER_BEST,
    "train.grad_checkpointing": f"{LAST_DIGITS}; {TWICE}",
}

RENAMED = (("data", "real", "real_labels"),)  # (group, key, its present name), in runs that were started before

# what may be typed beside eval.py's run=: options of the command, and what is evaluated and how
COMMAND = ("run", "predict", "save_predictions", "out", "img_size")
MEASURED = ("data", "hardware", "task.inference", "task.stride", "task.scales", "task.flip")


@contextmanager
def writing(failed: str, advice: str = "") -> Iterator[None]:
    """Raise an OSError within as a RunError, which says what failed, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise RunError("; ".join(filter(None, (f"{failed}: {error}", advice)))) from error


def load_config(folder: Path) -> DictConfig:
    """The resolved configuration of a run, with the defaults of all keys that it lacks; see `_younger`.

    Whole groups, which one written by hand may do without, are not added. Raises RunError if there is no configuration,
    or something else in its place.
    """
    cfg = _stored(folder)
    for key, value in _younger(cfg).items():
        group, dot, _ = key.partition(".")
        if value != MISSING and (not dot or isinstance(cfg.get(group), DictConfig)):
            OmegaConf.update(cfg, key, value)
    return cfg


def _stored(folder: Path) -> DictConfig:
    """The configuration as it was written, with the present names of its keys. Raises RunError."""
    path = folder / "config.yaml"
    if not has_config(folder):
        raise RunError(f"{folder} holds no run: {path} does not exist; give a folder made by train.py (runs/<name>)")
    try:
        cfg = OmegaConf.load(path)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        if getattr(error, "errno", None) is not None:  # the system's; OmegaConf has one for a file with a number
            raise RunError(unreadable(path, error)) from error
        raise _damaged(folder, str(error)) from error
    if not isinstance(cfg, DictConfig):
        raise _damaged(folder, "it is a list")
    if "task" not in cfg:  # as in the oldest runs, which are classifiers
        cfg.task = {"name": "classify"}
    # train.py writes all of these; a configuration written by hand may do with the first two
    needed = {"model", "data", "task"} | ({"train", "hardware"} if is_run(folder) else set())
    if lacking := [group for group in sorted(needed) if not isinstance(cfg.get(group), DictConfig)]:
        raise _damaged(folder, f"it has no group {', '.join(lacking)}")
    for group, old, new in RENAMED:
        if old in cfg.get(group, {}):
            cfg[group][new] = cfg[group].pop(old)
    return cfg


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(
        f"config.yaml in {folder} is not a run's configuration: {why}; expected the file that train.py wrote: restore "
        "it from a copy"
    )


def has_config(folder: str | Path) -> bool:
    """Whether a folder holds a run's configuration, which every run has from its start on.

    Raises RunError where that cannot be told, as of a folder that this user may not enter.
    """
    try:
        return stat.S_ISREG(os.stat(os.path.join(folder, "config.yaml")).st_mode)
    except ValueError:  # no path has such a name
        return False
    except OSError as error:
        if is_absent(error) or error.errno == errno.ENAMETOOLONG:
            return False
        raise RunError(unreadable(folder, error)) from error


def is_run(folder: Path) -> bool:
    """Whether a run was started in this folder. Raises RunError as `has_config` does."""
    return has_config(folder) and os.path.isfile(folder / SESSIONS)


def runs_in(out: Path) -> Iterator[Path]:
    """The run folders below this one, sorted, at any depth; there are none inside a run.

    A folder that cannot be read is left out, with a note: there may be others' below `out`, or lost+found.
    """
    try:
        folders = sorted(path for path in entries(out) if path.is_dir())
    except OSError as error:
        note(f"{out} is left out: {error.strerror}")
        return
    for folder in folders:
        try:
            begun = is_run(folder)
        except RunError as error:
            note(f"left out: {error}")
            continue
        if begun:
            yield folder
        elif not folder.is_symlink() and not folder.name.startswith("."):
            if has_config(folder) and (folder / "metrics.jsonl").is_file():
                note(f"{folder} is left out: it has lost {SESSIONS}, with how it was started; restore it from a copy")
            yield from runs_in(folder)


def starts(folder: Path) -> list[dict[str, Any]]:
    """As `sessions`, but a run among others whose starts cannot be read is left out, with a note: it has none."""
    try:
        return sessions(folder)
    except RunError as error:
        note(f"left out: {error}")
        return []


def resume_command(folder: Path) -> str:
    """What to type to resume a run."""
    return f"{shell.command('train')} {shlex.quote(config.quote('resume', str(folder)))}"


def config_to_resume(folder: Path, overrides: list[str]) -> DictConfig:
    """The run's configuration with the harmless changes that were asked for.

    Raises RunError for others, and ConfigError for a number out of range.
    """
    stored = _stored(folder)
    asked = _compose(folder, overrides)
    was, now = flat(stored), flat(asked)
    was |= _younger(stored)
    changed = {key: (was.get(key), now.get(key)) for key in was | now if was.get(key) != now.get(key)}
    refused = {key: both for key, both in changed.items() if not is_in(key, FREE + REPORTED)}
    if refused:
        raise RunError(
            f"{folder} was started with another configuration, and resuming it with this one would mix the two:\n  "
            + "\n  ".join(f"{key}: the run has {old}, now {new}" for key, (old, new) in refused.items())
            + f"\n{_way_on(refused, overrides)}, or start a new run (another name=, no resume)"
        )
    typed = {key_of(text) for text in overrides}
    for key, (old, new) in changed.items():
        check_range(key, new)  # a file of one's own may have changed; what the run was started with was accepted then
        if key in typed and (said := needed(asked, key)):
            raise RunError(f"{key}={written(new)} would have no effect: it needs {said}")
        if is_in(key, REPORTED):
            say(f"{key} changes from {old} to {new}: {EFFECTS.get(key, LAST_DIGITS)}", "yellow")
    return asked


def _compose(folder: Path, typed: list[str]) -> DictConfig:
    """The configuration of what the run was started with and what is typed now, with the files of both."""
    if not sessions(folder):
        raise RunError(f"{folder} has lost the command that started it: {folder / SESSIONS} has no complete line")
    overrides, searched = _merge([*first_overrides(folder), *_lasting(folder)], typed), _searched(folder)
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # Hydra composes one command at a time
    try:
        cfg = config.compose(overrides, typed=typed, searched=searched)
    finally:
        GlobalHydra.instance().hydra = outer
    named = [key_of(text) for text in typed]  # keys, or groups, which set theirs
    for key, value in _younger(_stored(folder)).items():
        if not is_in(key, named):
            OmegaConf.update(cfg, key, value)
    return cfg


def _way_on(refused: dict[str, tuple[Any, Any]], typed: list[str]) -> str:
    """Advice on differences to a run, which were typed, or come from a recipe that has changed since its start."""
    named = [key_of(text) for text in typed]
    if "recipe" in named or any(is_in(key, named) for key in refused):
        return "leave these out to resume"
    given = (f"{key}={written(old)}" for key, (old, _) in refused.items())
    return f"a recipe has changed since; to resume as before give {' '.join(given)}"


def _younger(stored: DictConfig) -> dict[str, Any]:
    """Keys that did not exist when a run was started, with their defaults, whatever its recipe sets now."""
    known, name = flat(stored), stored.task.get("name")
    defaults = base("train") | hardware_defaults()
    defaults |= task_defaults(name) if name in options("task") else {}
    return {key: value for key, value in defaults.items() if key not in known}


def _lasting(folder: Path) -> list[str]:
    """The last values of LASTING keys that were typed to resume the run, if any: they hold from then on."""
    typed = (text for start in sessions(folder)[1:] for text in start["overrides"])
    return list({key_of(text): text for text in typed if key_of(text) in LASTING}.values())


def _searched(folder: Path) -> list[str]:
    """The folders of configuration files of this command, then of the one that started the run.

    Raises RunError if only the latter had any, and they are gone.
    """
    here, there = config.searched(), first_session(folder).get("searched", [])  # older runs lack it
    gone = [path for path in there if not Path(path).is_dir()]
    if gone and not here:
        raise RunError(
            f"{folder} was started with the configuration files in {gone[0]}, which no longer exists: give "
            "--config-dir=<the folder where they are now>"
        )
    return list(dict.fromkeys([*here, *(path for path in there if path not in gone)]))


def _merge(first: list[str], then: list[str]) -> list[str]:
    return list({key_of(text): text for text in [*first, *then]}.values())


def config_to_evaluate(folder: Path, overrides: list[str]) -> DictConfig:
    """The run's configuration with what may be typed for an evaluation: see MEASURED, and img_size=.

    Images of another data set are preprocessed as the run's were, unless something else is typed; this is reported.
    Raises RunError if an override names a model, file or task other than the run's own, or has no effect.
    """
    stored = load_config(folder)
    _refuse_idle(folder, stored, overrides)
    asked = [text for typed in overrides for text in _sized(typed) if is_in(key_of(text), MEASURED)]
    if not asked and not _lasting(folder):
        return stored
    cfg = _compose(folder, asked)
    sized = [text for text in overrides if key_of(text) in ("img_size", "data.img_size") and _sized(text)]
    if sized and not is_size_of_images(cfg):
        raise RunError(f"{sized[0]} would have no effect: it needs {resized_by(cfg)}")
    _refuse_training(stored, cfg, asked)
    if cfg.data.name != stored.data.name:
        _keep_preparation(cfg, stored, {key_of(text) for text in asked})
    return cfg


def _refuse_idle(folder: Path, stored: DictConfig, overrides: list[str]) -> None:
    own = [text for text in overrides if is_in(key_of(text), ("model", "checkpoint", "weights"))]
    if own:
        raise RunError(f"run={folder} already determines the model and its weights; leave out {' '.join(own)}")
    free, task = (*COMMAND, *MEASURED), stored.task.name
    idle = [text for text in overrides if not is_in(key_of(text), free) and text != f"task={task}"]
    if idle:
        raise RunError(
            f"run={folder} is evaluated as it was trained, task={task}: {' '.join(idle)} would have no effect. Leave "
            f"it out; what can be given is {', '.join(free)}"
        )


def _refuse_training(stored: DictConfig, cfg: DictConfig, typed: list[str]) -> None:
    was, now = flat(stored), flat(cfg)
    for key in (key_of(text) for text in typed if not text.startswith("++")):  # as config= writes all keys
        if was.get(key) != now.get(key) and (said := needed_to_evaluate(cfg, key)):
            raise RunError(f"{key}={written(now[key])} would have no effect: it needs {said}")


def _sized(text: str) -> list[str]:
    """`img_size=` as keys of `data`; it overrides the run's own evaluation size."""
    if key_of(text) != "img_size":
        return [text]
    value = text.partition("=")[2]
    return [] if value == "null" else [f"data.img_size={value}", "data.eval_img_size=null"]


def _keep_preparation(cfg: DictConfig, stored: DictConfig, typed: set[str]) -> None:
    """Preprocess images of another data set like those that the model was trained on."""
    there, here = _preparation(stored), _preparation(cfg)
    kept = {key: there[key] for key in there if there[key] != here[key] and key not in typed}
    for key, value in kept.items():
        OmegaConf.update(cfg, key, value)
    if kept:
        said = " ".join(f"{key}={written(value)}" for key, value in kept.items())
        say(f"data={cfg.data.name} is preprocessed like the run's images, {said}; type a key to override it", "yellow")


def _preparation(cfg: DictConfig) -> dict[str, Any]:
    """The preprocessing of images, by key of `data`."""
    found = vars(preprocessing(cfg, train=True)).copy()
    found |= {"img_size": found.pop("size"), "eval_img_size": cfg.data.eval_img_size}
    if cfg.task.name != "classify":
        found = {key: value for key, value in found.items() if key not in WHOLE}
        found |= {key: cfg.data[key] for key in SIDES}
    return {f"data.{key}": list(value) if isinstance(value, tuple) else value for key, value in found.items()}
