"""Hydra's errors, reworded to say what to type."""

import re
import shlex
from collections.abc import Sequence

import timm
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from recipes.config import checks
from recipes.config.errors import near
from recipes.config.quoting import quote
from recipes.shell import command

# packages of Hydra's plugins, by the option that each adds and a file of ours builds on
PLUGINS = {"hydra/sweeper/optuna": "hydra-optuna-sweeper", "hydra/launcher/submitit_slurm": "hydra-submitit-launcher"}
KEY = re.compile(r"[+~]{0,2}[\w./@-]+")
OWNERS = 4  # options that are named where a key belongs to one of them


def explain(error: Exception, overrides: Sequence[str], name: str) -> str:
    """What was wrong with the command line, what was expected, and the corrected form where there is one."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and (package := PLUGINS.get(error.missing_cfg_file)):
        return f"{error.missing_cfg_file} needs the package {package}: pip install {package}"
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file, error.options, name)
    if isinstance(error, yaml.YAMLError):
        return f"a configuration file is not valid YAML: {' '.join(str(error).split())}"
    refused = re.match(r"Could not (?:override|find a match in the config for) '([^']+)'", str(error))
    if refused:
        return _unknown_key(refused[1], name)
    several = next((text for text in overrides if _is_sweep(text)), None)
    if "Ambiguous value" in str(error) and several:
        key, value = several.split("=", 1)
        return (
            f"{several} has several values, but this is a single run. For one string: "
            f"{shlex.quote(quote(key, value))}; for a list: {shlex.quote(f'{key}=[{value}]')}; for one run each: add -m"
        )
    cause = error.__cause__
    return f"{error}" + (f"\n{cause}" if cause is not None else "")


def _is_sweep(override: str) -> bool:
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    bare = key.lstrip("\"'")
    if equals and bare != key and KEY.fullmatch(bare):  # quotes that a shell took for text
        typed = quote(bare, value.removesuffix(key[: len(key) - len(bare)]))
        return f"Hydra received {override} with quotes around key and value: type {shlex.quote(typed)}, and no others"
    if equals and KEY.fullmatch(key):
        return f"Hydra cannot parse {override}. With quotes it can: {shlex.quote(quote(key, value))}"
    models = checks.options("model")
    model = key if key in models else models[0]
    return f"{override} is not of the form key=value: type, for example, model={model} optim.lr=0.001"


def _unknown_option(missing: str, options: Sequence[str], name: str) -> str:
    group, _, given = missing.rpartition("/")
    if group == "model" and timm.is_model(given):
        return f"{given} is a timm model: type model=timm model.name={given}"
    many = f"one of the {len(options)} that `{command(name)} --help` lists"
    there = many if len(options) > 12 else ", ".join(options)
    return f"unknown {group} {given!r}{near(given, options)}: expected {there}"


def _unknown_key(key: str, name: str) -> str:
    if key in checks.keys(name):
        return f"unknown key {key!r} here: it belongs to {_owners(key)}; `{command(name)} --cfg job` prints every key"
    keys = [known for known in checks.keys(name) if ("." in known) == ("." in key)]
    same = [known for known in checks.keys(name) if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = near(key, keys) if not same else f" (did you mean {' or '.join(same)}?)"
    advice = f"; pass a further constructor argument of the model as +{key}=" if key.startswith("model.") else ""
    return f"unknown key {key!r}{hint}{advice}; `{command(name)} --cfg job` prints every key"


def _owners(key: str) -> str:
    """The options that a key belongs to; none of them is chosen."""
    group, found = key.split(".")[0], checks.having(key)
    said = " or ".join(f"{group}={option}" for option in found[:OWNERS])
    return said + (f" or {len(found) - OWNERS} more" if len(found) > OWNERS else "")
