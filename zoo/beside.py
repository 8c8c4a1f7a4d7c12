"""What says beside a weights file how its model is built: the files of a run, or timm's config.json."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from os.path import isdir, isfile  # which are False, not an error, for what cannot be looked at: reading says why
from pathlib import Path
from typing import Any

import yaml  # which timm needs as well
from timm.models import load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path

from .blocks import image_sides
from .errors import CheckpointError
from .files import checkpoints_in, unreadable
from .recognise import BY_TIMM, architecture

CONFIG, DATA, STATE = "config.yaml", "data.json", "state.json"  # of a run: recipes/run.py, recipes/checkpoint.py
# keys of a run's model that are no arguments of its constructor, or matter only in training
OTHERS = ("name", "pretrained", "checkpoint", "backbone", "weights", "drop_path_rate")


@dataclass(frozen=True)
class Origin:
    """How the model of a weights file was built.

    source     the file that says so
    name       of the zoo's or timm's, possibly with a tag
    arguments  beyond the name
    prepared   entries of `pretrained_cfg`: size and normalisation of its images
    """

    source: Path
    name: str
    arguments: dict[str, Any]
    prepared: dict[str, Any]


def locate(path: Path) -> tuple[Path, Origin | None]:
    """The weights file that a path stands for, and how its model was built, if that is said beside it.

    path  a file, or a folder: of a run, whose best checkpoint is taken, or its newest if none has been evaluated; of
          such a checkpoint; or one that `zoo.save_for_hf` wrote. Any other path is returned as it is
    Raises CheckpointError for a run without a checkpoint, and if these, or what lies beside weights, cannot be read.
    """
    if _is_run(path):
        path = _checkpoint(path)
    if isfile(path / STATE):
        path = _read(path / STATE, _evaluated)
    run = path.absolute().parent.parent.parent
    if _is_run(run):
        return path, _read(run / CONFIG, _of_run)
    if isdir(path) and architecture(path) is not None:
        path = next((path / name for name in BY_TIMM if isfile(path / name)), path)
    if path.name in BY_TIMM and architecture(path.parent) is not None:
        return path, _read(path.with_name("config.json"), _beside_config)
    return path, None


def config_of(address: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What timm reads from the config.json of an address, hf-hub:user/name or local-dir:folder: the preprocessing, the
    name of the model, and its arguments. Raises OSError, ValueError or KeyError without one.
    """
    source, place = parse_model_name(address)
    return load_model_config_from_path(place) if source == "local-dir" else load_model_config_from_hf(place)


def _is_run(folder: Path) -> bool:
    return all(isfile(folder / name) for name in (CONFIG, DATA))


def _checkpoint(run: Path) -> Path:
    for kind in ("best", "step"):
        try:
            found = checkpoints_in(run, kind)
        except OSError as error:
            raise CheckpointError(unreadable(run / "checkpoints", error)) from error
        if found:
            return found[0]
    raise CheckpointError(f"{run} is a run without a checkpoint yet: expected one in {run / 'checkpoints'}")


def _read(source: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source}, which describes the weights beside it, cannot be read ({why})") from error


def _evaluated(state: Path) -> Path:
    """The weights of a checkpoint that its run evaluated; its folder if they are sharded."""
    file = state.with_name(f"{json.loads(state.read_text(encoding='utf-8'))['weights']}.safetensors")
    return file if file.is_file() else state.parent


def _of_run(config: Path) -> Origin:
    said = yaml.safe_load(config.read_text(encoding="utf-8"))
    data = json.loads(config.with_name(DATA).read_text(encoding="utf-8"))
    given = {key: value for key, value in said["model"].items() if value is not None}
    name, arguments, prepared = given["name"], {}, {}
    if ":" in name:
        name, arguments, prepared = _of_timm(*config_of(name))
    arguments |= {key: data[key] for key in ("num_classes", "img_size")}
    arguments |= {key: value for key, value in given.items() if key not in OTHERS}
    prepared |= {key: said["data"][key] for key in ("mean", "std") if said["data"][key] is not None}
    prepared |= {"input_size": (3, *image_sides(arguments["img_size"]))}
    return Origin(config, name, arguments, prepared)


def _beside_config(config: Path) -> Origin:
    return Origin(config, *_of_timm(*load_model_config_from_path(config.parent)))


def _of_timm(said: dict[str, Any], name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, arguments and preparation, from what timm reads from a config.json."""
    prepared = {key: said[key] for key in ("mean", "std", "input_size") if key in said}
    return name, {"num_classes": said["num_classes"], **arguments}, prepared
