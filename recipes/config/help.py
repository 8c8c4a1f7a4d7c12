"""What --help prints: commands, models by family, then the options of every other group.

The commands come from the head of train.yaml and eval.yaml; an option is described by the first line of its file.
"""

from importlib.resources import files
from itertools import groupby

from recipes import shell
from recipes.config import contents
from recipes.config.groups import register

USAGE = {
    "train": "Train an image model.",
    "eval": "Evaluate weights on a data set, beside the published figure, or predict on images.",
}
ORDER = ("data", "recipe", "task", "optim", "hardware", "logger")  # of the groups below the models
WORDS = {
    "train": {
        "keys": "(optim.lr=3e-4 model.depths=[2,2,5,2]); it overrides the recipe",
        "several": "seed=0,1,2",
        "file": "model.checkpoint",
        "kept": ", or from a run's config.yaml",
    },
    "eval": {
        "keys": "(img_size=288 hardware.amp=bfloat16)",
        "several": "img_size=224,288",
        "file": "checkpoint",
        "kept": "",
    },
}
CLOSING = """
Any key can be given as key=value {keys}.
Further constructor arguments of a model: +model.global_pool=max. Several runs: -m {several}.
File names with spaces, commas or brackets are quoted twice: '{file}="my file (1).pth"'.

    {command} --cfg job [--resolve]   prints every key with its value
    {command} config=FILE             takes every key from that output{kept}
    {command} --hydra-help            Hydra's own options"""
COMPLETES = '\n    eval "$({command} -sc install=bash)"   turns on shell completion'


def text(name: str) -> str:
    """The help of `name`.py."""
    register()
    command = shell.command(name)
    lines = [USAGE[name], "", f"    {command} [group=option ...] [key=value ...]", "", *_commands(name, command)]
    lines += ["", "model="]
    models = [option for option in contents.options("model") if option not in ("timm", "auto")]
    for family, names in groupby(models, key=lambda model: model.split("_")[0]):
        lines.append(f"  {family:14} {' '.join(names)}")
    lines.append(f"  {'timm':14} any timm model: model=timm model.name=resnet50")
    if name == "eval":
        lines.append(f"  {'auto':14} recognised from the file that checkpoint= names (the default)")
    used = contents.chosen_groups(name)
    for group in (group for group in ORDER if group in used):
        lines += ["", f"{group}="]
        lines += [f"  {option:14} {_first_comment(group, option)}" for option in contents.options(group)]
    closing = CLOSING + (COMPLETES if command.endswith(".py") else "")  # Hydra completes commands of files alone
    said = closing.format(command=command, **WORDS[name])
    return "\n".join(lines) + "\n" + said


def _commands(name: str, command: str) -> list[str]:
    """The commands at the head of the configuration, as they are typed here."""
    given = f"# python {name}.py"
    lines = (files("recipes.conf") / f"{name}.yaml").read_text("utf-8").splitlines()
    return [f"    {command}{line.removeprefix(given)}" for line in lines if line.startswith(given)]


def _first_comment(group: str, option: str) -> str:
    lines = (files("recipes.conf") / group / f"{option}.yaml").read_text("utf-8").splitlines()
    first = next(line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @"))
    return first.removesuffix(":")  # a command follows there
