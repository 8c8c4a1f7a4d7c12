"""What eval.py evaluates: weights given as a file, a folder of files, or the name of a release or of a hub model.

If no model is named, it is recognised from the weights; if these are a release, its preprocessing is used.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from omegaconf import DictConfig, open_dict

import zoo
from recipes import eval_dense_models
from recipes.config import ConfigError
from recipes.config.checks import REMOTE
from recipes.config.errors import near
from recipes.config.quoting import written
from recipes.console import say
from recipes.data.build import Preprocessing, preprocessing
from recipes.names import apart, file_names
from recipes.recognised import is_built_with, lacking, left_open
from recipes.settings import RunError, has_config
from zoo import releases
from zoo.beside import CONFIG, locate
from zoo.checkpoint import only_part, part_of
from zoo.described import TensorInfo
from zoo.fetch import releases_in, warn_of_licence
from zoo.heads.recognise import recognise_dense
from zoo.inspect import SUFFIXES, files
from zoo.reader import Description
from zoo.recognise import Recognition, architecture, hint, part_hint
from zoo.releases import RELEASES, Release

LOADABLE = {r.name: r for r in RELEASES if r.loadable}
OBJECTS = "-objects.json"  # the longest ending of a result file


@dataclass(frozen=True)
class EvaluatedModel:
    """One set of weights.

    name       its name in tables: that of the file or of the release
    cfg        the evaluation's configuration with this model and, if the weights are a release, its preprocessing
    release    None if the weights are not known to be one
    arguments  what a release was built with
    kinds      which weights a file has, "raw", "ema" or both
    """

    name: str
    cfg: DictConfig
    release: Release | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()

    def published(self) -> float | None:
        """The published figure in percent, if this is for the same model, weights, images, labels and classes,
        preprocessed alike.
        """
        if self.release is None or not is_built_with(self.cfg.model, self.arguments):
            return None
        if len(self.kinds) > 1 and self.cfg.model.weights not in ("auto", self.release.weights):
            return None
        if self.cfg.task.name != "classify":
            return eval_dense_models.published(self.cfg, self.release)
        data = self.cfg.data
        if data.name != "imagenet" or data.subset is not None or data.real_labels:
            return None
        cfg = self.release.cfg()
        keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        there = Preprocessing(cfg["input_size"][1:], **{key: cfg[key] for key in keys})
        return self.release.top1 if preprocessing(self.cfg) == there else None


def sources(cfg: DictConfig) -> list[str | None]:
    """What `checkpoint=` names: a folder stands for the files in it, or for the model that timm saved there; a run
    folder stays as it is; None stands for the model's own weights.

    Raises ConfigError for a folder without weights.
    """
    given = cfg.checkpoint or cfg.model.checkpoint
    if given is None:
        return [None]
    given = [given] if isinstance(given, str) else given
    written_out = (_files(Path(text)) if os.path.isdir(text) else [text] for text in given)
    return list(dict.fromkeys(source for part in written_out for source in part))


def stems(sources: list[str]) -> list[str]:
    """Stems of the result files of several sources: the name of the file, or its path where two names are equal, and a
    number where two paths give the same. `eval` is that of the table.
    """
    names = [_name(source) if os.path.exists(source) else source for source in sources]
    found = file_names(["eval", *sources], ["eval", *names], OBJECTS)
    taken = [f"{stem}{OBJECTS.removesuffix('.json')}" for stem in found]  # not the record of another source
    return file_names([*taken, *found], [*taken, *found], OBJECTS)[len(taken) + 1 :]


def names(sources: list[str]) -> list[str]:
    """Names of several sources in tables: those of files and folders, or the parts in which their paths differ where
    two names are equal."""
    paths = [source for source in sources if os.path.exists(source)]
    own = [_name(path) for path in paths]
    called = dict(zip(paths, own if len(set(own)) == len(own) else apart(paths, tail=True), strict=True))
    return [called.get(source, source) for source in sources]


def _name(path: str) -> str:
    return Path(os.path.abspath(path)).name


def _files(folder: Path) -> list[str]:
    try:
        if has_config(folder):
            return [str(folder)]
    except RunError:  # as its turn comes, `find` says why
        return [str(folder)]
    if _is_shared(folder):
        return [f"local-dir:{folder}"]
    found = list(map(str, files([folder])))
    if not found:
        raise ConfigError(f"checkpoint={folder} contains no file of weights ({', '.join(SUFFIXES)})")
    return found


def _is_shared(folder: Path) -> bool:
    """Whether timm saved the folder, as `zoo.save_for_hf` does; config.json then has model, size and preprocessing."""
    name = architecture(folder)
    return name is not None and timm.is_model(name)


def find(cfg: DictConfig, source: str | None) -> EvaluatedModel:
    """The model that one of the `sources` names; `cfg` is not changed.

    Raises ConfigError if the model cannot be recognised, CheckpointError for a file that cannot be read or fits none,
    RunError for what cannot be looked at.
    """
    if source is not None and has_config(source):
        raise ConfigError(f"checkpoint={source} is a run folder: give run={source} instead")
    cfg = copy.deepcopy(cfg)
    cfg.data.img_size = cfg.data.img_size if cfg.img_size is None else cfg.img_size
    if cfg.model.name is None and source is not None and os.path.isfile(source):
        source = _described(source)
    if source is not None and not os.path.exists(source):  # Path's own fails where a name is too long for a file
        cfg.model.name, cfg.model.pretrained, source = _published(source), True, None
    cfg.model.checkpoint = source
    if source is None:
        release = LOADABLE.get(cfg.model.name) if cfg.model.pretrained else None
        return EvaluatedModel(cfg.model.name, cfg, release, _arguments(release))
    file = zoo.describe(source)
    if cfg.task.name == "classify":
        release = _configure(cfg, file)
        arguments = _arguments(release)
    else:
        release, arguments = eval_dense_models.configure(cfg, file)
    warn_of_licence(release)
    return EvaluatedModel(Path(source).name, cfg, release, arguments, tuple(file.entries))


def _arguments(release: Release | None) -> dict[str, Any]:
    """Those that a classifier was released with, its variant's own and others."""
    return zoo.variants()[release.model] | dict(release.arguments) if release else {}


def _described(file: str) -> str:
    """The folder of `zoo.save_for_hf` that a file lies in, which says what no tensor shows, such as DaViT's windows;
    else the file. Raises ConfigError for a file of a run.
    """
    _, origin = locate(Path(file))
    if origin is None:
        return file
    if origin.source.name == CONFIG:
        raise ConfigError(
            f"checkpoint={file} is of a run, whose configuration says how its model is built: give "
            f"run={origin.source.parent}, or name the model, with its arguments, by model="
        )
    return f"local-dir:{origin.source.parent}"


def _published(source: str) -> str:
    """timm's name of the model that a name of a release or of the hub stands for."""
    release = releases.find(source)
    if release is not None and release.loadable and source != release.model:
        return release.name
    if not source.startswith(REMOTE):
        raise ConfigError(
            f"checkpoint={source} is not a file, folder or release{near(source, LOADABLE)}: expected a path, a name "
            "in checkpoints.md such as maxvit_t_tv.tv_in1k, or one on the hub such as hf-hub:timm/davit_tiny.msft_in1k"
        )
    return source


def _instead(state: Mapping[str, TensorInfo], path: Path) -> str:
    """What to do with a file that cannot be evaluated as it is."""
    if dense := recognise_dense(state):
        return f". It holds a backbone with {dense.head}: evaluate it with task={dense.task}"
    return part_hint(state, path) or ". Name a model with model=, or with model=timm model.name= for one of timm"


def _configure(cfg: DictConfig, file: Description) -> Release | None:
    """Set `model` of `cfg` to what a file holds, if that is a model of the zoo, and report it; returns the release that
    it is, None if it is not known to be one.

    A model that was named is built with the file's windows too. Raises ConfigError if the model, or how it was built,
    cannot be recognised.
    """
    path, given = Path(file.path), cfg.model.name
    variant = given and given.partition(".")[0]
    if given is not None and variant not in zoo.variants():  # a model of timm
        return None
    file, _ = part_of(file, only_part(file))
    found = zoo.recognise(file.first, hint(file))
    fits, named = releases_in(path, file.meta, found, given)
    model = variant or (fits[0].model if named else found.model)
    if model is None:
        raise ConfigError(f"{path} is {found.message}{_instead(file.first, path)}")
    built = _build_as(cfg, model, found, path)
    if not fits:
        cfg.model.name = given or model
        say(f"{path} is evaluated as {model}{built}; it matches no known release")
        return None
    cfg.model.name = fits[0].name
    others = f" (or {' or '.join(r.name for r in fits[1:])}: model=timm model.name=<it>)" if fits[1:] else ""
    say(f"{path} is evaluated as {fits[0].name}{'' if named else f', judging by its tensors{others}'}")
    return fits[0]


def _build_as(cfg: DictConfig, model: str, found: Recognition, path: Path) -> str:
    """Set the arguments with which `model` is as the file's, unless others are asked for; returns them in words."""
    if said := lacking(cfg.model, found, model, str(path)):
        raise ConfigError(said)
    own, wanted = zoo.variants()[model], left_open(cfg.model, found.arguments(model), {})
    if cfg.data.img_size is not None:  # which the windows follow
        wanted.pop("img_size", None)
    wanted = {key: value for key, value in wanted.items() if value != own.get(key)}
    with open_dict(cfg):
        cfg.model.update(wanted)
    words = " ".join(f"model.{key}={written(value)}" for key, value in wanted.items())
    return f" with {words}" if words else ""
