"""From the `model` group of a configuration to a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import zoo
from recipes import papers, weights
from recipes.config import ConfigError
from recipes.data import Data
from recipes.data.build import preprocessing
from recipes.log import say
from recipes.run import find_checkpoint
from recipes.settings import load_config
from zoo.heads.recognise import recognise_dense
from zoo.recognise import hint

OURS = {"name", "pretrained", "checkpoint", "backbone", "weights", "num_classes", "img_size", "drop_path_rate"}
NOTHING = "there is nothing to measure. Give the data that it was trained for"
OVERLAY = "pretrained_cfg_overlay=dict(file=...)"  # how the zoo alone is given a file

Make = Callable[..., nn.Module]  # called with a name and arguments


def create(
    cfg: DictConfig, data: Data, *, pretrained: bool = True, make: Make = timm.create_model, **head: Any
) -> nn.Module:
    """Build `model.name` for this data and load `model.pretrained` or `model.checkpoint` unless `pretrained=False`.

    make  what builds it; `head` are further arguments of that function, None is left to its default

    `model.img_size`, `model.drop_path_rate` left null become the data's size and the recipe's rate for models that
    take them. Raises ConfigError for a constructor argument, or a value of one, that the model does not take, for a
    checkpoint of another model, released weights that cannot be had, and, where nothing is trained, weights without a
    classifier for these classes; RunError for a folder without a checkpoint.
    """
    given = OmegaConf.to_container(cfg.model, resolve=True)
    options = {key: value for key, value in given.items() if key not in OURS and value is not None}
    options["num_classes"] = data.num_classes if cfg.model.num_classes is None else cfg.model.num_classes
    options["pretrained"] = bool(cfg.model.pretrained and pretrained)
    wishes = {"img_size": data.img_size, "drop_path_rate": OmegaConf.select(cfg, "train.drop_path_rate")}
    for key in wishes:
        if given.get(key) is not None:
            options[key] = given[key]
    options |= {key: value for key, value in head.items() if value is not None}
    if options.get("in_chans", 3) != 3:
        raise ConfigError(
            f"model.in_chans={options['in_chans']}: images come in three channels here, grey ones too. Leave it out; a "
            "model of another number is for your own code"
        )
    model = build(make, cfg.model.name, options, {key: wishes[key] for key in wishes if key not in options})
    if cfg.model.checkpoint is not None and pretrained:
        _load(model, cfg)
    elif options["pretrained"] and "train" not in cfg:
        _check_answers(model, cfg)
    if cfg.model.get("backbone") is not None and pretrained:
        start_backbone(model, cfg.model.backbone)
    if pretrained and "paper" in cfg:
        _say_start(cfg)
    return model


def _say_start(cfg: DictConfig) -> None:
    """Say so where the published training began with weights, and this one does not."""
    given = cfg.model.pretrained or cfg.model.checkpoint or cfg.model.get("backbone")  # older runs lack the last
    begins = papers.starts(cfg.model.name, cfg.paper.phase, cfg.task.name)
    if begins and not given:
        other = "model.checkpoint=<file>" if cfg.task.name == "classify" else "model.backbone=runs/<name>"
        say(
            f"this recipe of {cfg.model.name} starts from {begins}, and none are given: the model begins at random. "
            f"Give model.pretrained=true or {other}",
            "yellow",
        )


def check_classes(cfg: DictConfig, data: Data) -> None:
    """Raise ConfigError where a dense model is to have other classes than the data, by which it is measured."""
    if cfg.model.num_classes not in (None, data.num_classes):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes}: the data has {data.num_classes} classes, by which the model "
            "is measured. Leave it out"
        )


def _load(model: nn.Module, cfg: DictConfig) -> None:
    given, kind = cfg.model.checkpoint, cfg.model.weights
    if weights.is_run(given):
        weights.check_model(given, cfg.model.name)
        _say_seen_otherwise(cfg, Path(given))
        given, kind = weights.of_run(given, kind), "auto"  # these alone
    report = zoo.load_checkpoint(model, given, weights=kind)
    if report.head_remade and "train" not in cfg:
        raise ConfigError(f"{report.message}: {NOTHING}")
    say(report.message)
    if "train" in cfg and cfg.task.name != "classify" and not weights.is_run(cfg.model.checkpoint):
        _say_built_otherwise(cfg)


def _check_answers(model: nn.Module, cfg: DictConfig) -> None:
    """Raise ConfigError where timm loaded weights without a classifier for the classes of `model`: it has a new one."""
    name = cfg.model.name
    if cfg.task.name != "classify":
        raise ConfigError(
            f"the weights of {name} are of a backbone, so its {cfg.task.head} starts from scratch: there is nothing to "
            "measure. Give checkpoint=<file of the whole model>, or run=runs/<name>"
        )
    known, wanted = model.pretrained_cfg.get("num_classes"), model.num_classes  # of the weights, of the data
    if known != wanted:
        has = f"are for {known} classes" if known else "have no classifier"
        raise ConfigError(f"the weights of {name} {has}, so a new one for {wanted} starts from scratch: {NOTHING}")


def _say_seen_otherwise(cfg: DictConfig, run: Path) -> None:
    """Say so where images are normalised in another way than those that a run learned from, which features notice."""
    there, here = preprocessing(load_config(run), train=True), preprocessing(cfg, train=True)
    if (there.mean, there.std) != (here.mean, here.std):
        given = " ".join(f"data.{key}=[{','.join(map(str, getattr(there, key)))}]" for key in ("mean", "std"))
        say(f"{run} learned from images that were normalised otherwise than these are: {given} is how", "yellow")


def _say_built_otherwise(cfg: DictConfig) -> None:
    """Say so where the authors build a released file's backbone in another way for its task, which no weight shows."""
    path, variant = Path(cfg.model.checkpoint), cfg.model.name.partition(".")[0]
    file, own = zoo.describe(path), zoo.variants().get(variant, {})
    found = recognise_dense(next(iter(file.entries.values())), hint(str(path), file.meta))
    for key, value in (found.arguments(variant) if found else {}).items():
        if cfg.model.get(key, own.get(key)) == own.get(key):  # no other value was asked for
            say(f"{path} is of a model with model.{key}={value}, which this one is built without: give it", "yellow")


def start_backbone(model: nn.Module, folder: str) -> None:
    """Copy the backbone of a run's best weights into that of a dense model, which may have norms that the run had not.

    Raises ConfigError where the model has no backbone of its own, or the run is one of another model.
    """
    if not hasattr(model, "backbone"):
        raise ConfigError(f"model.backbone={folder} is for segmentation and detection; here use model.checkpoint")
    found, inner = find_checkpoint(Path(folder)), getattr(model.backbone, "model", model.backbone)
    want = inner.state_dict()
    state = _bare(found.tensors(found.state["weights"]), "backbone.", "model.")
    same = {name: state[name] for name in want if name in state and state[name].shape == want[name].shape}
    if other := [name for name in want if name not in same and not name.startswith("feature_norms.")]:
        raise ConfigError(
            f"model.backbone={folder} is the run of another model: {len(other)} tensors of this one's backbone are not "
            f"in it or have another shape, {other[0]} among them"
        )
    inner.load_state_dict(want | same)
    say(f"the backbone starts from {found.path}, {found.state['weights']} weights")


def _bare(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """What lies behind each prefix in turn, where anything does, without it."""
    for prefix in prefixes:
        inner = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        state = inner or state
    return state


def build(make: Make, name: str, options: dict[str, Any], wishes: dict[str, Any]) -> nn.Module:
    """Build with as many of the wishes as the model's constructor takes, and say which it does not."""
    wishes = {key: value for key, value in wishes.items() if value is not None}
    while True:
        try:
            model = make(name, **options, **wishes)
            # for the card of the run
            model.created_by, model.created_with = make.__name__, {"model_name": name, **options, **wishes}
            return model
        except TypeError as error:
            refused = next((key for key in wishes if f"argument '{key}'" in str(error)), None)
            if refused is None:
                raise ConfigError(f"{name} could not be built with {options | wishes}: {error}") from error
            say(f"{name} takes no {refused}; it is built without it")
            del wishes[refused]
        except zoo.CheckpointError as error:
            raise zoo.CheckpointError(str(error).replace(OVERLAY, "model.checkpoint=<file>")) from error
        except OSError as error:  # no network, or no such file on the hub
            if not options.get("pretrained"):
                raise
            raise ConfigError(_not_released(name, error)) from error
        except ValueError as error:
            raise ConfigError(f"{name} could not be built with {options | wishes}: {error}") from error


def _not_released(name: str, error: OSError) -> str:
    why = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"the released weights of {name} could not be downloaded: {why}\nin place of pretrained=true a file that is "
        "here can be given: model.checkpoint=<file>, or of a teacher teacher.checkpoint=<file>"
    )
