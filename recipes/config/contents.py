"""What our configuration files hold: groups, their options, and every key with its default."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf


@cache
def base(name: str) -> dict[str, Any]:
    """Every key of common.yaml and `name`.yaml with its default, flat."""
    conf = files("recipes.conf")
    tree = OmegaConf.merge(*(OmegaConf.create((conf / f"{file}.yaml").read_text("utf-8")) for file in ("common", name)))
    for key in ("defaults", "hydra"):
        tree.pop(key, None)
    return flat(tree)


def task_defaults(name: str) -> dict[str, Any]:
    """Every key of the file of a task with its default, flat."""
    return {f"task.{key}": value for key, value in option_keys("task", name).items()}


def hardware_defaults() -> dict[str, Any]:
    """Every key of `hardware` with its default, flat."""
    return {f"hardware.{key}": value for key, value in option_keys("hardware", "auto").items()}


def keys(name: str) -> list[str]:
    """Every key that can be given on the command line of `name`.py."""
    own = chosen_groups(name)
    found = [*base(name), *own]
    for group in own:
        if group != "recipe":  # a recipe sets keys of the other groups
            found += [f"{group}.{key}" for option in options(group) for key in option_keys(group, option)]
    return list(dict.fromkeys(found))


@cache
def chosen_groups(name: str) -> list[str]:
    """The configuration groups of which `name`.py takes an option."""
    defaults = OmegaConf.to_container(
        OmegaConf.create((files("recipes.conf") / f"{name}.yaml").read_text("utf-8")).defaults
    )
    chosen = {group for entry in defaults if isinstance(entry, dict) for group in entry}
    return [group for group in groups() if group in chosen]


def groups() -> list[str]:
    """The configuration groups, without Hydra's own."""
    found = [entry.name for entry in files("recipes.conf").iterdir() if entry.is_dir() and entry.name[0].isalpha()]
    folders = [name for name in found if name != "hydra"]
    return ["model", *sorted(folders)]


def options(group: str) -> list[str]:
    """The options of a group, sorted."""
    names = ConfigStore.instance().list("model") if group == "model" else _files(group)
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def having(key: str) -> list[str]:
    """The options of its group that have a key."""
    group, _, rest = key.partition(".")
    return [option for option in options(group) if rest in option_keys(group, option)]


def _files(group: str) -> list[str]:
    return [entry.name for entry in (files("recipes.conf") / group).iterdir()]


@cache
def option_keys(group: str, option: str) -> dict[str, Any]:
    """Every key of an option, flat. Kept, since reading all of them takes as long as composing a configuration."""
    if group == "model":
        return flat(ConfigStore.instance().load(f"model/{option}.yaml").node)
    found = OmegaConf.create((files("recipes.conf") / group / f"{option}.yaml").read_text("utf-8"))
    found.pop("defaults", None)  # of the options of other groups
    return flat(found)


def flat(cfg: DictConfig) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, without resolving anything."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}".lstrip("."), item)
        elif prefix:
            found[prefix] = value

    walk("", OmegaConf.to_container(cfg, resolve=False))
    return found
