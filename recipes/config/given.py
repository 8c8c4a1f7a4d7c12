"""Arguments that stand for several: config=FILE, for every key of a configuration that was printed or that a run has
stored; and eval.py's run=, for the keys of the run's task.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from recipes.config import checks, contents
from recipes.config.errors import ConfigError
from recipes.config.groups import register
from recipes.config.quoting import key_of, quote, readings, written

KEY = "config="
EXPECTED = "give a run's config.yaml, or the output of --cfg job"
VALUED = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
FLAGS = ("--run",)  # Hydra's, called like a key of ours
OWN = ("name", "out", "resume")  # of one run; the next has its own


def expanded(arguments: Sequence[str], name: str = "train") -> list[str]:
    """The arguments of `name`.py with `config=FILE` expanded to overrides, before the others, which take precedence.

    Raises ConfigError for a value without a key, for a key with dashes, for a choice that is not an option of its
    group, for a file that is missing or holds no configuration, and for an option of a group beside it:
    the file has a value for every key, so a recipe would change nothing, and a model would be mixed with another.
    """
    if "--hydra-help" in arguments:
        return ["--hydra-help"]  # which is not about our configuration, and knows no key of it
    _refuse_dashes(arguments, name)
    found = [override for text in arguments if text.startswith(KEY) for override in _overrides(text[len(KEY) :], name)]
    others = [text for text in arguments if not text.startswith(KEY)]
    chosen = [text for text in others if key_of(text) in contents.groups()]
    if found and chosen:
        raise ConfigError(
            f"{KEY} already sets every key, including those of {' and '.join(key_of(text) for text in chosen)}: leave "
            f"out {' '.join(chosen)} and give the single keys to change, or leave out {KEY}"
        )
    checks.check_options(arguments, name)
    return [text for text in _placed(found, arguments) if not text.startswith(KEY)]


def with_task_of_run(arguments: Sequence[str], name: str = "eval") -> list[str]:
    """The arguments of eval.py with the task of the run that `run=` names, those of train.py with that of `resume=`,
    unless a task is typed.

    Otherwise Hydra would only know the keys of classification. The runs of a sweep, `run=a,b`, must share the task; of
    these, one that holds no run fails when it is its turn. Raises RunError if the only folder holds none.
    """
    from recipes.settings import load_config

    key = "run" if name == "eval" else "resume"
    found = [readings(text) for text in arguments if text.startswith(f"{key}=")]
    named = [folder for folder in (found[-1] if found else []) if isinstance(folder, str) and folder != "auto"]
    folders = list(map(os.path.expanduser, named))
    if "" in folders:
        raise ConfigError(checks.EMPTY.format(key))
    if not folders or any(key_of(text) == "task" for text in arguments):
        return list(arguments)
    there = [Path(folder) for folder in folders if len(folders) == 1 or _holds_run(folder)]
    tasks = {OmegaConf.select(load_config(folder), "task.name") for folder in there}
    chosen = [task for task in tasks if len(tasks) == 1 and task in contents.options("task")]
    return _placed([f"task={task}" for task in chosen], arguments)


def _holds_run(folder: str) -> bool:
    """Whether a folder holds a run that this user may look at."""
    from recipes.settings import RunError, has_config

    try:
        return has_config(folder)
    except RunError:
        return False


def _refuse_dashes(arguments: Sequence[str], name: str) -> None:
    """Raise ConfigError for a key that is typed like an option of a command, `--lr=3`."""
    register()  # the models, of whose group there are keys as well
    for text in (text for text in arguments if text.startswith("--") and text not in FLAGS):
        flag, _, value = text.removeprefix("--").partition("=")
        known = [KEY.rstrip("="), *contents.keys(name)]
        same = [flag] if flag in known else [key for key in known if key.rpartition(".")[2] == flag]
        if same:
            typed = " or ".join(f"{key}={value or '<value>'}" for key in same)
            raise ConfigError(f"{text} is no option: a key is given without dashes, {typed}")


def _placed(found: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """`found` before all overrides, and flags, with what belongs to them, before these, as Hydra wants them."""
    flags, overrides, before = [], [], ""
    for text in arguments:
        belongs = before in VALUED or (before in ("--info", "-i") and "=" not in text)
        (flags if belongs or text.startswith("-") else overrides).append(text)
        before = text
    return [*flags, *found, *overrides]


def _overrides(file: str, name: str) -> list[str]:
    if not file:
        raise ConfigError(checks.EMPTY.format(KEY.rstrip("=")))
    register()  # the models, of which the file names one
    try:
        loaded = OmegaConf.load(os.path.expanduser(file))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{KEY}{file} is not a configuration: {error}; {EXPECTED}") from error
    cfg = loaded if isinstance(loaded, DictConfig) else OmegaConf.create()
    if name == "eval" and "train" in cfg:
        raise ConfigError(f"{KEY}{file} is for train.py: give the output of eval.py --cfg job, or only run=<folder>")
    if name == "eval" and cfg.get("run") is not None:
        return _beside_run(cfg)
    if "name" not in cfg.get("model", {}):
        raise ConfigError(
            f"{KEY}{file} is not a configuration: it has no model.name; {EXPECTED}. A file with only some keys is a "
            "recipe: put it into the subfolder recipe/ of a folder and pass that as --config-dir="
        )
    group = cfg.model.name if cfg.model.name in contents.options("model") else "timm"
    task = OmegaConf.select(cfg, "task.name")  # a group has keys that another lacks
    groups = [f"model={group}", *([f"task={task}"] if task in contents.options("task") else [])]
    return [*groups, *(f"++{key}={written(value)}" for key, value in contents.flat(cfg).items() if key not in OWN)]


def _beside_run(cfg: DictConfig) -> list[str]:
    """The overrides given together with eval.py's run=, recovered from the output of --cfg job: every value that
    differs from the default for this run.
    """
    from recipes.config import compose

    OmegaConf.resolve(cfg)
    typed = [quote("run", cfg.run)]
    for group in ("task", "data"):  # the second follows from the first
        option, usual = OmegaConf.select(cfg, f"{group}.name"), compose(typed, "eval")[group].name
        typed += [f"{group}={option}"] if option != usual and option in contents.options(group) else []
    usual = contents.flat(compose(typed, "eval"))
    other = {key: value for key, value in contents.flat(cfg).items() if key not in usual or value != usual[key]}
    return [*typed, *(f"++{key}={written(value)}" for key, value in other.items())]
