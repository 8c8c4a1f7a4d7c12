"""Hydra's errors, reworded to say what to type."""

import re
import shlex
from collections.abc import Sequence

import timm
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from recipes import to_install
from recipes.config import checks, contents
from recipes.config.errors import near
from recipes.config.quoting import key_of, quote, reads_as
from recipes.names import at_home
from recipes.shell import command
from zoo.errors import first_line

# extras with Hydra's plugins, by the option that each adds and a file of ours builds on
PLUGINS = {"hydra/sweeper/optuna": "search", "hydra/launcher/submitit_slurm": "slurm"}
KEY = re.compile(r"[+~]{0,2}[\w./@-]+")
# where submitit's errors name the log of a job
LOG = re.compile(r"with path (?P<job>.*)_result\.pkl$|^  - (?P<log>.*\.err)$", re.MULTILINE)
OWNERS = 4  # options that are named where a key belongs to one of them


def explain(error: Exception, overrides: Sequence[str], name: str) -> str:
    """What was wrong with the command line, what was expected, and the corrected form where there is one."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, name)
    if isinstance(error, MissingConfigException) and (extra := PLUGINS.get(error.missing_cfg_file)):
        return f"{error.missing_cfg_file} needs the packages of the extra `{extra}`: {to_install(extra)}"
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file, error.options, name)
    if isinstance(error, yaml.YAMLError):
        return f"a configuration file is not valid YAML: {' '.join(str(error).split())}"
    refused = re.match(r"Could not (?:override|find a match in the config for) '([^']+)'", str(error))
    if refused:
        return _unknown_key(refused[1], name)
    several = next((text for text in overrides if _is_sweep(text)), None)
    if "Ambiguous value" in str(error) and several:
        return f"{several} has several values, but this is a single run. {_single(several, name)}"
    cause = error.__cause__
    return f"{error}" + (f"\n{cause}" if cause is not None else "")


def of_launcher(error: Exception, name: str) -> str | None:
    """Why a launcher could not start its jobs, or which one of these ended without a result; None for other errors."""
    if isinstance(error, ModuleNotFoundError) and error.name == "submitit":
        return f"this launcher needs the package submitit, which is not installed: {to_install('slurm')}"
    if str(error).startswith('Could not detect "srun"'):  # submitit's words
        return (
            "hydra/launcher=slurm starts jobs of Slurm, but there is no srun on this machine: start it where there is "
            "one, or leave the launcher out"
        )
    if not type(error).__module__.startswith("submitit."):
        return None
    found = LOG.search(str(error))
    if found is None:
        return f"a job of this sweep could not be started: {first_line(error)}"
    log = found["log"] or f"{found['job']}_log.err"
    again = "; the same command with name= and resume=auto resumes those that stopped" if name == "train" else ""
    return f"a job of this sweep ended without a result, see {log}. Others may still be running{again}"


def _single(several: str, name: str) -> str:
    """How to write several values as one, and how to have a run of each."""
    key, value = several.split("=", 1)
    kinds, ways = checks.kinds(key_of(several), name), []
    if key == "predict":
        ways.append("for several images: predict=<folder>, or 'predict=<folder>/*.jpg'")
    elif kinds & {"text", "texts"}:
        ways.append(f"for one string: {shlex.quote(quote(key, value))}")
    if kinds & {"list", "names", "texts", "size"}:
        ways.append(f"for a list: {shlex.quote(f'{key}=[{value}]')}")
    if not ways and kinds != {"choice"}:
        ways.append("give one value")
    said = "; ".join([*ways, "for one run each: add -m"])
    return f"{said[0].upper()}{said[1:]}"


def _is_sweep(override: str) -> bool:
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False


def _unreadable(override: str, name: str) -> str:
    key, equals, value = override.partition("=")
    bare = key.lstrip("\"'")
    if equals and KEY.fullmatch(bare) and reads_as(f"{bare}=x") is None:
        return f"{override}: {key_of(bare)} is not a key; `{command(name)} --cfg job` prints every key"
    if equals and bare != key and KEY.fullmatch(bare):  # quotes that a shell took for text
        typed = quote(bare, value.removesuffix(key[: len(key) - len(bare)]))
        return f"Hydra received {override} with quotes around key and value: type {shlex.quote(typed)}, and no others"
    if equals and KEY.fullmatch(key):
        try:
            typed = shlex.quote(quote(key, at_home(value)))
        except OSError as error:
            return f"{override}: {error}"
        how = "With the whole path" if value.startswith("~") else "With quotes"
        return f"Hydra cannot parse {override}. {how} it can: {typed}"
    models = contents.options("model")
    model = key if key in models else models[0]
    return f"{override} is not of the form key=value: type, for example, model={model} optim.lr=0.001"


def _unknown_option(missing: str, options: Sequence[str], name: str) -> str:
    group, _, given = missing.rpartition("/")
    if group == "model" and timm.is_model(given):
        return f"{given} is a timm model: type model=timm model.name={given}"
    if name == "train":  # it refuses a model that is to be recognised
        options = [option for option in options if (group, option) != ("model", "auto")]
    return f"unknown {group} {given!r}{near(given, options)}: expected {checks.listed(options, name)}"


def _unknown_key(key: str, name: str) -> str:
    if key in contents.keys(name):
        return f"unknown key {key!r} here: it belongs to {_owners(key)}; `{command(name)} --cfg job` prints every key"
    keys = [known for known in contents.keys(name) if ("." in known) == ("." in key)]
    same = [known for known in contents.keys(name) if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = near(key, keys) if not same else f" (did you mean {' or '.join(same)}?)"
    advice = f"; pass a further constructor argument of the model as +{key}=" if key.startswith("model.") else ""
    return f"unknown key {key!r}{hint}{advice}; `{command(name)} --cfg job` prints every key"


def _owners(key: str) -> str:
    """The options that a key belongs to; none of them is chosen."""
    group, found = key.split(".")[0], contents.having(key)
    said = " or ".join(f"{group}={option}" for option in found[:OWNERS])
    return said + (f" or {len(found) - OWNERS} more" if len(found) > OWNERS else "")
