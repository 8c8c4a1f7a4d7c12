"""What eval.py measures: weights as a file, a folder of files, the name of a release or of the hub.

The model is found from the weights where none is named, and the release that they are brings its preprocessing.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
from omegaconf import DictConfig

import zoo
from recipes import dense_subjects
from recipes.config import ConfigError
from recipes.config.checks import REMOTE
from recipes.config.errors import near
from recipes.data.build import preprocessing
from recipes.log import say
from recipes.names import apart
from zoo import releases
from zoo.described import TensorInfo
from zoo.heads.recognise import recognise_dense
from zoo.inspect import SUFFIXES, files
from zoo.recognise import hint, part_hint
from zoo.releases import RELEASES, Release

LOADABLE = {r.name: r for r in RELEASES if r.loadable}


@dataclass(frozen=True)
class Subject:
    """One set of weights.

    name     what tables call it: the file's name, or the release's
    cfg      the evaluation's configuration with this model and, where the weights are a release, its preprocessing
    release  None where the weights are not known to be one
    """

    name: str
    cfg: DictConfig
    release: Release | None

    def published(self) -> float | None:
        """What the source published, in percent, where this is measured on the same images, cut or resized the same."""
        if self.release is None:
            return None
        if self.cfg.task.name != "classify":
            return dense_subjects.published(self.cfg, self.release)
        if self.cfg.data.name != "imagenet":
            return None
        asked, cfg = preprocessing(self.cfg), self.release.cfg()
        there = asked.size, asked.interpolation, asked.crop_pct, asked.crop_mode, asked.mean, asked.std
        mode = cfg["crop_mode"], cfg["mean"], cfg["std"]
        same = there == (cfg["input_size"][1:], cfg["interpolation"], cfg["crop_pct"], *mode)
        return self.release.top1 if same else None


def sources(cfg: DictConfig) -> list[str | None]:
    """What `checkpoint=` names, folders as the files in them, or as the one model that timm wrote there, a run's as it
    is; None for the model's own weights.

    Raises ConfigError for a folder without weights.
    """
    given = cfg.checkpoint or cfg.model.checkpoint
    if given is None:
        return [None]
    given = [given] if isinstance(given, str) else given
    written_out = (_files(Path(text)) if os.path.isdir(text) else [text] for text in given)
    return list(dict.fromkeys(source for part in written_out for source in part))


def stems(sources: list[str]) -> list[str]:
    """What the files about each of several sources are called: as its own file, or as its path where two are alike."""
    names = [_name(source) if os.path.exists(source) else source for source in sources]
    alike = {name for name in names if names.count(name) > 1}
    chosen = (source if name in alike else name for source, name in zip(sources, names, strict=True))
    return [re.sub(r"[/\\:]", "-", text.lstrip("./")) for text in chosen]


def names(sources: list[str]) -> list[str]:
    """What tables call several sources: as their own files and folders, or by what tells their paths apart where two
    are alike."""
    paths = [source for source in sources if os.path.exists(source)]
    own = [_name(path) for path in paths]
    called = dict(zip(paths, own if len(set(own)) == len(own) else apart(paths, tail=True), strict=True))
    return [called.get(source, source) for source in sources]


def _name(path: str) -> str:
    return Path(os.path.abspath(path)).name


def is_run(source: str) -> bool:
    """Whether one of the `sources` is the folder of a run."""
    return os.path.isfile(os.path.join(source, "config.yaml"))


def _files(folder: Path) -> list[str]:
    if is_run(str(folder)):
        return [str(folder)]
    if _is_shared(folder):
        return [f"local-dir:{folder}"]
    found = list(map(str, files([folder])))
    if not found:
        raise ConfigError(f"checkpoint={folder} holds no file of weights ({', '.join(SUFFIXES)})")
    return found


def _is_shared(folder: Path) -> bool:
    """Whether timm wrote the folder, as `zoo.save_for_hf` does; its config.json says model, size and preprocessing."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or another program's
        return False
    name = said.get("architecture") if isinstance(said, dict) else None
    return isinstance(name, str) and timm.is_model(name)


def find(cfg: DictConfig, source: str | None) -> Subject:
    """The subject that one of the `sources` names; `cfg` is left as it is.

    Raises ConfigError where the model cannot be told, CheckpointError for a file that cannot be read or is of none.
    """
    if source is not None and is_run(source):
        raise ConfigError(f"checkpoint={source} is the folder of a run: run={source} is what to give here")
    cfg = copy.deepcopy(cfg)
    cfg.data.img_size = cfg.data.img_size if cfg.img_size is None else cfg.img_size
    if source is not None and not os.path.isfile(source):  # Path's own fails where a name is too long for a file
        cfg.model.name, cfg.model.pretrained, source = _published(source), True, None
    cfg.model.checkpoint = source
    if source is not None and cfg.task.name != "classify":
        release = dense_subjects.configure(cfg, Path(source))
        return Subject(Path(source).name, cfg, release)
    if source is not None:
        cfg.model.name = _model_of(cfg.model.name, Path(source))
    name = cfg.model.name
    release = LOADABLE.get(name) if cfg.model.checkpoint or cfg.model.pretrained else None
    return Subject(name if source is None else Path(source).name, cfg, release)


def _published(source: str) -> str:
    """timm's name of the model that a release's or the hub's name stands for."""
    release = releases.find(source)
    if release is not None and release.loadable and source != release.model:
        return release.name
    if not source.startswith(REMOTE):
        raise ConfigError(
            f"checkpoint={source} is no file or folder and no release{near(source, LOADABLE)}: expected a path, a name "
            "of checkpoints.md such as maxvit_t_tv.tv_in1k, or one of the hub, hf-hub:timm/davit_tiny.msft_in1k"
        )
    return source


def _instead(state: Mapping[str, TensorInfo], path: Path) -> str:
    """What to do with a file that is measured as no model as it is."""
    if dense := recognise_dense(state):
        return f". It holds a backbone with {dense.head}: measure it with task={dense.task}"
    return part_hint(state, path) or ". Name one with model=, or model=timm model.name= for timm's"


def _model_of(given: str | None, path: Path) -> str:
    """timm's name, with the release's tag where there is one, of the model that a file holds.

    given  the model that was named, None if it is to be found
    """
    if given is not None and given not in zoo.variants():  # a model of timm, or a tag as well
        return given
    file = zoo.describe(path)
    state = next(iter(file.entries.values()))
    found = zoo.recognise(state, hint(str(path), file.meta))
    layouts = dict(found.candidates)
    named = releases.find(given, filename=path.name)
    named = named if named and named.loadable and named.model in (layouts if given is None else (given,)) else None
    model = given or (named.model if named else found.model)
    if model is None:
        raise ConfigError(f"{path} is {found.message}{_instead(state, path)}")
    if named:
        say(f"{path} is measured as {named.name}")
        return named.name
    fits = [r for r in releases.candidates(model, layouts.get(model, "")) if r.loadable]
    fits = [r for r in fits if found.classes in (None, r.num_classes)]
    if not fits:
        say(f"{path} is measured as {model}; no release is known that it could be")
        return model
    others = f" (or {' or '.join(r.name for r in fits[1:])}: model=timm model.name=<it>)" if fits[1:] else ""
    say(f"{path} is measured as {fits[0].name}, by its tensors{others}")
    return fits[0].name
