"""The model that is shown: by name, or from a weights file."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..beside import Origin, locate
from ..checkpoint import load_checkpoint
from ..errors import CheckpointError
from ..fetch import fetching
from ..reader import Checkpoint, read
from ..recognise import hint, parts, recognise, recognised_part, without_prefix
from ..registry import variants
from .picture import ShowError

RANDOM = "random weights"


def build(
    name: str | None, checkpoint: str | None, img_size: tuple[int, int] | None, /, **given: Any
) -> tuple[nn.Module, str, str]:
    """(model, its name without a tag, text about its weights).

    checkpoint  a file, or a folder as in `beside.locate`
    img_size    the zoo's models are built for it, timm's if possible; None: their own, or the one that a file shows
    given       arguments of the model's constructor, which take precedence over those of a checkpoint
    Raises ShowError for an unknown name and for arguments that the model cannot be built with, and CheckpointError for
    a file that cannot be read, is not a model of the zoo, is not the named model, or does not show how its model is
    built.
    """
    if checkpoint is None:
        given = {"pretrained": "." in name, **given}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that pictures of random weights are reproducible
            model = create(name, img_size, **given)
        return model, name.partition(".")[0], f"weights of {name}" if given["pretrained"] else RANDOM
    path, origin = locate(Path(checkpoint))
    file = read(path)
    name, part, options = _said(origin, file, name) if origin else _recognised(file, name, given)
    options |= given
    own = options.pop("img_size", None)
    model = create(name, img_size or own, **options)
    model.pretrained_cfg.update(origin.prepared if origin else {})
    print(load_checkpoint(model, file, part=part).message)
    return model, name.partition(".")[0], f"weights of {'/'.join(path.parts[-4:])}"


def _said(origin: Origin, file: Checkpoint, name: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """Name of the model, part of the file that it is, if it is not the whole, and its arguments."""
    own = origin.name.partition(".")[0]
    if name is not None and name.partition(".")[0] != own:
        raise CheckpointError(f"{file.path} is of {own}, says {origin.source}, not of {name}: leave out model={name}")
    return origin.name, _backbone(file), dict(origin.arguments)


def _backbone(file: Checkpoint) -> str | None:
    """The part of a segmenter or detector that is drawn; None for a model that has no such part."""
    return "backbone" if "backbone" in parts(without_prefix(file.first)) else None


def _recognised(file: Checkpoint, name: str | None, given: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """As `_said`, from the tensors alone."""
    said = hint(file)
    found, part = recognise(file.first, said), None
    if not found.candidates:
        part, found = recognised_part(file.first, said) or (_backbone(file), found)
    name = name or found.model
    if name is None and found.candidates:
        raise CheckpointError(f"{file.path} is {found.message}, with model=")
    if name is None:
        raise CheckpointError(
            f"{file.path} is not of a model of the zoo as its table has it: name the model with model=, and give the "
            "arguments in which it differs, such as depths=[1,1,2,1]"
        )
    architecture = name.partition(".")[0]
    if any(key not in given for key in found.missing_args(architecture)):
        raise CheckpointError(f"{file.path} is of {found.message}, with model={architecture}")
    classes = {} if found.classes is None else {"num_classes": found.classes}
    return name, part, found.arguments(architecture) | classes


def create(name: str, img_size: int | tuple[int, int] | None, /, **kwargs: Any) -> nn.Module:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, [*variants(), *timm.list_models()], 3)
        raise ShowError(f"no model is called {architecture}" + (f": did you mean {' or '.join(near)}?" if near else ""))
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ShowError(f"{architecture} has no weights with that tag: {name}") from error
    if img_size is not None and architecture in variants():
        kwargs["img_size"] = img_size
    try:
        with fetching(name):
            model = timm.create_model(name, **kwargs)
    except (TypeError, ValueError) as error:
        raise ShowError(f"{name} could not be built with {kwargs}: {error}") from error
    if img_size is not None and architecture not in variants() and hasattr(model, "set_input_size"):
        model.set_input_size(img_size)
    return model
