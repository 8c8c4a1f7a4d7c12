"""What a configuration may hold: types and choices that Hydra does not check."""

import re
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
from omegaconf import DictConfig, ListConfig, OmegaConf

from recipes import papers
from recipes.config.contents import (
    base,
    chosen_groups,
    flat,
    groups,
    hardware_defaults,
    having,
    keys,
    option_keys,
    options,
    task_defaults,
)
from recipes.config.errors import ConfigError, near
from recipes.config.idle import check_read, needed
from recipes.config.quoting import key_of, quote, readings, reads_as
from recipes.config.ranges import check_range
from recipes.names import at_home
from recipes.shell import command

INTERPOLATIONS = (None, "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CHOICES = {
    "model.weights": ("auto", "raw", "ema"),
    "weights": ("auto", "raw", "ema"),
    "data.subset": (None, "a", "r"),
    "data.interpolation": INTERPOLATIONS,
    "data.crop_mode": (None, "center", "squash", "border"),
    "data.on_bad_image": ("raise", "replace"),
    "data.jpeg": ("scaled", "full"),
    "data.cache": (None, "ram", "disk"),
    "task.inference": ("whole", "slide"),
    "task.loss": ("cross_entropy", "binary_cross_entropy"),
    "teacher.kind": (None, "soft", "hard", "feature"),
    "augment.interpolation": (*INTERPOLATIONS, "random"),
    "augment.re_mode": ("const", "rand", "pixel"),
    "sched.sched": ("cosine", "linear", "constant", "poly", "step"),
    "sched.unit": ("epochs", "steps"),
    "sched.per": ("step", "epoch"),
    "optim.lr_scaling": ("linear", "sqrt"),
    "sched.decay_from": ("warmup", "start"),
    "hardware.amp": (None, "bfloat16", "float16"),
    "hardware.parallel": ("ddp", "fsdp"),
    "logger.mode": (None, "online", "offline", "disabled"),
}
# the types of keys whose default (often null) does not show it
TEXT = {
    "name", "out", "resume", "run", "predict", "model.name", "model.checkpoint", "model.backbone", "data.name",
    "data.source", "data.root", "data.hub", "data.cache_dir", "data.train_images", "data.val_images",
    "data.train_masks", "data.val_masks", "data.train_list", "data.val_list", "data.image_suffix", "data.train_json",
    "data.val_json", "data.interpolation", "augment.interpolation", "augment.auto_augment", "hardware.device",
    "teacher.name", "teacher.checkpoint", "logger.entity",
}  # fmt: skip
INTEGERS = {
    "train.steps", "train.eval_steps", "train.micro_batch", "data.side_multiple",
    "model.num_classes", "data.num_classes", "data.train_count", "data.val_count", "data.long_side",
    "data.workers", "data.eval_batch_size", "hardware.threads", "task.channels",
}  # fmt: skip
NUMBERS = {
    "train.epochs", "train.eval_every", "train.clip_grad", "train.ema", "train.drop_path_rate", "model.drop_path_rate",
    "augment.hflip", "augment.vflip", "data.val_fraction", "data.crop_pct", "optim.lr_base_batch", "optim.eps",
    "optim.momentum", "optim.layer_decay", "sched.warmup", "sched.cooldown", "sched.warmup_ratio",
    "sched.lr_base_batch", "task.left_out_weight", "task.target_threshold", "hardware.timeout",
}  # fmt: skip
SWITCHES = {"data.antialias", "hardware.channels_last", "hardware.compile", "hardware.deterministic"}
LISTS = {
    "data.mean", "data.std", "data.things", "data.label_ids", "augment.scale", "augment.ratio", "optim.betas",
    "task.stride",
}  # fmt: skip
NAMES = {"optim.decay", "optim.no_decay"}
NEEDED = {"data.name", "data.source"}  # not null, though no file has a default for them
SIZES = {"data.img_size", "data.eval_img_size", "model.img_size", "teacher.img_size", "img_size"}
TEXTS = {"checkpoint", "train.freeze"}
FULL = {*TEXT, *TEXTS} - {"data.image_suffix", "name"}  # not empty; a run says why its own is not
EMPTY = "{}= is empty: give a name, or leave it out"  # as from a shell variable that is not set
PATHS = (
    "out", "resume", "run", "predict", "checkpoint", "model.checkpoint", "model.backbone", "teacher.checkpoint",
)  # fmt: skip
CLASSIFY = ("data.eval_img_size", "teacher.kind")  # keys for classification only, outside its own group
NO_MODEL = {
    "train": "model=auto is for eval.py, which recognises the model of a file: to train, name one, model=maxvit_t",
    "eval": "nothing to evaluate: give run=runs/<name>, checkpoint=<file>, or model=<name> model.pretrained=true",
}
FURTHER = ("model", "optim")  # groups that take keys beside those in our files: arguments of what is built
SEVERAL = ("logger",)  # groups of which several options can be chosen at once
BY_TASK = "recipe/by_task"  # what a recipe sets for a task, if it sets anything
WITHIN = ("hydra/", BY_TASK)  # groups within others, Hydra's and ours, begin so
PHASE = "paper.phase"  # a key that only a recipe has, in no base file
REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")
SAID = {
    "text": "a string, in quotes if it looks like something else: {quoted}",
    "integer": "a whole number",
    "number": "a number",
    "switch": "true or false",
    "list": "a list, {key}=[a,b]",
    "names": "a list of strings, {key}=[a,b]",
    "size": "a whole number or [height,width]",
    "texts": "a string or a list of strings, {key}=[a,b]",
}
INTERPOLATED = "a string, as ${{...}} gives with text around it: {quoted}"


def check(cfg: DictConfig, name: str, overrides: Sequence[str] = (), *, begun: bool = False) -> None:
    """Resolve `cfg` and the `~` of its paths in place and check it; `overrides` are the arguments typed for it.

    begun  whether a run was started with the rest, which was accepted then

    Raises ConfigError for a value of the wrong type, an unknown choice or model, a recipe that is not published, a key
    that nothing reads, a number out of range, and a typed key that has no effect, unless it was written with `++`, as
    every key of a `config=FILE` is.
    """
    _check_kept(name, overrides)
    if cfg.task.name not in options("task"):
        raise ConfigError(f"task.name={cfg.task.name} is no task: choose one, task={' or task='.join(options('task'))}")
    if OmegaConf.is_missing(cfg.model, "name"):
        raise ConfigError("model=timm needs the model's name as well: model=timm model.name=resnet50")
    if cfg.model.name is None and (name == "train" or (cfg.run is None and cfg.checkpoint is None)):
        raise ConfigError(NO_MODEL[name])
    if "paper" in cfg:
        papers.recipe(cfg.model.name, cfg.paper.phase, cfg.task.name)  # raises if there is none
    begun = begun or cfg.get("resume") not in (None, "auto")
    _check_keys(cfg, name, overrides, begun)
    OmegaConf.resolve(cfg)
    _resolve_home(cfg)
    typed = {key_of(text): text.partition("=")[2] for text in overrides}
    _check_task(cfg, typed)
    if name == "eval":
        _check_evaluation(cfg, [key_of(text) for text in overrides if not text.startswith("++")])
    values, usual = flat(cfg), _usual(name, cfg.task.name)
    for key in usual.keys() - values.keys():  # it has keys of its own
        if isinstance(OmegaConf.select(cfg, key), Mapping | DictConfig):
            values[key] = OmegaConf.to_container(OmegaConf.select(cfg, key))
    for key, value in values.items():
        accepted = begun and key not in typed  # when the run was started
        unread = value is None and usual.get(key) is not None and needed(cfg, key)
        if value in (None, "", []) and (accepted or unread):
            continue
        _check_value(key, value, usual.get(key), typed.get(key, str(value)))
    for key in ("model.name", "teacher.name"):
        if values.get(key) is not None and not values[key].startswith(REMOTE):
            _check_model(key, values[key])
    for key, value in values.items():
        if key in typed or not begun:
            check_range(key, value)
    forced = {key_of(text) for text in overrides if text.startswith("++")}
    mine = {key: values[key] for key in typed if key in values and key not in forced}
    check_read(cfg, mine, base(name) | hardware_defaults() | task_defaults(cfg.task.name))


def _resolve_home(cfg: DictConfig) -> None:
    """A shell leaves `~` in quotes, and after `key=`, as it is. The readers of data resolve theirs."""
    for key in PATHS:
        given = OmegaConf.select(cfg, key)
        try:
            if isinstance(given, str):
                OmegaConf.update(cfg, key, at_home(given))
            elif isinstance(given, ListConfig):
                OmegaConf.update(cfg, key, [at_home(one) if isinstance(one, str) else one for one in given])
        except OSError as error:
            raise ConfigError(f"{key}={given}: {error}") from error


def _check_kept(name: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key of ours that is to be left out, `~train.ema`, or a group of them, `~augment`.

    A number or null in the place of a group, `augment=null`, would leave out its keys as well.
    """
    defaults = base(name)
    for text in overrides:
        key, removes = key_of(text), text.startswith("~")
        if not any(is_in(known, (key,)) for known in defaults):
            continue
        if key not in defaults and (removes or not isinstance(reads_as(text), str | dict | list)):
            raise ConfigError(f"{text} would leave out {key}, which is read: set its keys, {key}.<key>=")
        if removes:
            null = ", such as null" if _nullable(key, defaults[key]) else ""
            raise ConfigError(f"{text} would leave out {key}, which is read: give it another value{null}")


def check_options(overrides: Sequence[str], name: str) -> None:
    """Raise ConfigError for a choice that names no option of its group, `data=null`, or several where one is chosen.

    The same for a value without a key, and for a group that is to be left out, `~data`.
    """
    for text in overrides:
        key, values = key_of(text), readings(text) if "=" in text else []
        group, chosen = key.partition("@")[0], chosen_groups(name)
        if text and not key:
            raise ConfigError(f"{text} has no key, as where a variable of the shell is not set: expected key=value")
        if text.startswith("~") and key in chosen:
            raise ConfigError(f"{text} would leave out {key}, which is read: choose another option, {key}=<option>")
        if all(_is_option(group, value) for value in values):
            continue
        if group in chosen:
            bracketed = any(isinstance(value, list) for value in values)
            runs = "; for one run each add -m and leave out the brackets" if bracketed else ""
            raise ConfigError(f"{text} is not an option of {group}: expected {listed(options(group), name)}{runs}")
        if group.startswith(WITHIN):
            raise ConfigError(f"{text} is not an option of {group}: expected {group}=<option>")


def _is_option(group: str, value: object) -> bool:
    several = isinstance(value, list) and (group in SEVERAL or group.startswith(WITHIN))
    return all(isinstance(one, str) for one in (value if several else [value]))


def check_by_task(overrides: Iterable[str], folders: Iterable[str]) -> None:
    """Raise ConfigError for a `recipe/by_task=` that neither we nor one of these folders have: Hydra passes it over."""
    own = {path.stem for folder in folders for path in Path(folder, BY_TASK).glob("*.yaml")}
    there = sorted(own.union(options(BY_TASK)))
    values = [value for text in overrides if text.lstrip("+").startswith(f"{BY_TASK}=") for value in readings(text)]
    for one in (one for value in values for one in (value if isinstance(value, list) else [value])):
        if one not in there:
            raise ConfigError(f"unknown {BY_TASK} {one!r}{near(one, there)}: expected {', '.join(there)}")


def listed(names: Sequence[str], name: str) -> str:
    """Options as a message of `name`.py names them: those of a long list are left to --help."""
    return f"one of the {len(names)} that `{command(name)} --help` lists" if len(names) > 12 else ", ".join(names)


def check_shadowed(folders: Iterable[str]) -> None:
    """Raise ConfigError if a file in one of these folders would not be read, since ours of its name goes before it."""
    conf = files("recipes.conf")
    for folder in folders:
        for group in ("", *groups()):
            for path in sorted(Path(folder, group).glob("*.yaml")):
                ours = conf / group / path.name
                if ours.is_file() and ours.read_text("utf-8") != path.read_text("utf-8", "replace"):
                    option = f", and pass {group}=<its new name>" if group else ""
                    raise ConfigError(f"{path} would not be read, since a file of ours has its name: rename it{option}")


def _check_keys(cfg: DictConfig, name: str, overrides: Sequence[str], begun: bool) -> None:
    """Check that something reads every key; of a run that was started before, every key that is added now.

    Hydra only finds misspelt keys that are typed without a plus, not those in files. A key of your own may be used by
    others as ${key}; it may be typed if it lies outside our groups. What is typed for a key of ours, `seed={a:1}`, is
    checked as its value.
    """
    known, found = {*keys(name), PHASE}, flat(cfg)
    ours = {key.partition(".")[0] for key in known}
    words = re.findall(r"[\w.]+", " ".join(text for text in map(str, found.values()) if "${" in text))
    served = {word.strip(".") for word in words} - ours
    added = {key_of(text): text for text in overrides if text.startswith("+")}
    added = {key: text for key, text in added.items() if key in found or "={" in text}  # not an option of a group
    valued = {key_of(text) for text in overrides} & (known - set(groups()))
    read = {key for key in found if key in known or _is_argument(key) or _serves(key, served) or is_in(key, valued)}
    for key in (key for key in found if key not in read):
        text = next((added[one] for one in added if is_in(key, [one])), None)
        hint = near(key, known)
        if text is not None and (key.partition(".")[0] in ours or hint):
            raise ConfigError(f"{text}: nothing reads {key}{hint}; the keys that `--cfg job` prints take no plus")
        if text is None and not begun:
            raise ConfigError(f"nothing reads {key}, which one of your files sets{hint}{_misplaced(key, ours)}")


def is_in(key: str, groups: Iterable[str]) -> bool:
    """Whether a key is one of these or lies in one of them."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _is_argument(key: str) -> bool:
    return key.partition(".")[0] in FURTHER


def _serves(key: str, served: set[str]) -> bool:
    """Whether one of the words in ${...} names a key, or what it lies in."""
    return is_in(key, served) or key.endswith(tuple(f".{word}" for word in served))


def _misplaced(key: str, groups: set[str]) -> str:
    """Advice for a key that ended up in the group of its file but was meant for another."""
    group, _, rest = key.partition(".")
    if group != "recipe" and rest.partition(".")[0] not in groups:
        return ""
    return f": a file in {group}/ that sets keys of other groups must begin with the line `# @package _global_`"


def _check_task(cfg: DictConfig, typed: Container[str]) -> None:
    """Check that neither a recipe nor the command line sets keys that the task does not have."""
    asked = [f"task.{key}" for key in cfg.task if f"task.{key}" not in task_defaults(cfg.task.name)]
    if cfg.task.name != "classify":
        asked += [key for key in CLASSIFY if OmegaConf.select(cfg, key) is not None]
    if own := [key for key in asked if key in typed]:
        sized = "; data.short_side= and data.long_side= resize its images" if "data.eval_img_size" in own else ""
        raise ConfigError(f"task={cfg.task.name} has no {', '.join(own)}: leave it out{sized}")
    if asked:
        raise ConfigError(
            f"task={cfg.task.name} has no {', '.join(asked)}: expected a recipe for this task, not for classification"
        )
    teacher = cfg.get("teacher")
    if teacher is not None and teacher.kind is None and (teacher.name or teacher.checkpoint):
        raise ConfigError("a teacher is named, but not what to learn from it: set teacher.kind=soft, hard or feature")


def _check_evaluation(cfg: DictConfig, typed: Container[str]) -> None:
    """Check that eval.py was not asked for two things of which it would do one."""
    if cfg.predict is not None and cfg.save_predictions:
        raise ConfigError(
            f"predict={cfg.predict} answers for images of your own, and save_predictions=true is for the images of an "
            "evaluation: leave out one of them"
        )
    sizes = [key for key in ("data.img_size", "data.eval_img_size") if key in typed]
    other = next((key for key in sizes if OmegaConf.select(cfg, key) not in (None, cfg.img_size)), None)
    if cfg.img_size is not None and other is not None:
        raise ConfigError(f"img_size= and {other}= both give the size of images: leave out one of them")


def _check_model(key: str, model: str) -> None:
    """Raise ConfigError for a model that neither the zoo nor timm has, or one with a tag that it does not have."""
    if not timm.is_model(model):
        raise ConfigError(f"{key}={model} is not a model of this zoo or of timm{near(model, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError as error:
        name = model.partition(".")[0]
        tagged = timm.list_pretrained(f"{name}.*")
        expected = ", ".join([name, *tagged])
        raise ConfigError(f"{key}={model}: {name} has no such tag{near(model, tagged)}: expected {expected}") from error


def _usual(name: str, task: str) -> dict[str, Any]:
    """The default of every key, of a group of options that of the first with this key; None where it is "not given"."""
    found = base(name) | task_defaults(task)
    for group in chosen_groups(name):
        if group not in ("model", "task", "recipe"):  # each model has arguments of its own
            for option in options(group):
                for key, value in option_keys(group, option).items():
                    found.setdefault(f"{group}.{key}", value)
    return {key: None if value == "???" else value for key, value in found.items()}


def kinds(key: str, name: str) -> set[str]:
    """The types of a key, which may differ between options of its group; "texts" where nothing is known of it."""
    if key in SEVERAL:
        return {"names"}
    if key in CHOICES or key in chosen_groups(name):
        return {"choice"}
    group, _, rest = key.partition(".")
    defaults = [option_keys(group, option)[rest] for option in having(key)] if group in groups() else []
    found = {_kind(key, default) for default in (base(name).get(key), *defaults)}
    return found - {None} or {"texts"}


def _check_value(key: str, value: Any, default: Any, typed: str) -> None:
    kind = _kind(key, default)
    if kind is None and isinstance(value, dict) and not _is_argument(key):
        raise ConfigError(f"{key}={typed} was read as dict: expected a single value or a list")
    if kind is not None and not (value is None and _nullable(key, default)) and not _fits(value, kind):
        said = _expected(key, kind, typed)
        read = "" if value is None else f" was read as {type(value).__name__}"
        raise ConfigError(f"{key}={'null' if value is None else typed}{read}: expected {said}")
    if value in ("", []) and key in FULL:
        raise ConfigError(EMPTY.format(key))
    if key in CHOICES and value not in CHOICES[key]:
        said = ", ".join("null" if choice is None else choice for choice in CHOICES[key])
        raise ConfigError(f"{key}={value} is unknown{near(value, filter(None, CHOICES[key]))}: expected {said}")


def _expected(key: str, kind: str, typed: str) -> str:
    if kind == "text" and "${" in typed:
        bare = typed.strip("\"'")
        return INTERPOLATED.format(quoted=shlex.quote(quote(key, f"text-{bare}")))
    return SAID[kind].format(key=key, quoted=shlex.quote(quote(key, typed)))


def _nullable(key: str, default: object) -> bool:
    """Whether a key may be null, as its default is, or as what has no type may."""
    untyped = default is None or _kind(key, default) is None
    return untyped and key not in NEEDED and None in CHOICES.get(key, (None,))


def _kind(key: str, default: object) -> str | None:
    """The type of a key: from the tables above, else from its default."""
    tables = {
        "text": TEXT, "texts": TEXTS, "integer": INTEGERS, "number": NUMBERS, "switch": SWITCHES, "list": LISTS,
        "names": NAMES, "size": SIZES,
    }  # fmt: skip
    kinds = {bool: "switch", int: "integer", float: "number", list: "list", str: "text"}
    return next((kind for kind, table in tables.items() if key in table), kinds.get(type(default)))


def _fits(value: object, kind: str) -> bool:
    if kind == "size":
        return _fits(value, "integer") or (isinstance(value, list) and len(value) == 2)
    if kind == "texts":
        return isinstance(value, str) or _fits(value, "names")
    if kind == "names":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, {"text": str, "switch": bool, "list": list}[kind])
