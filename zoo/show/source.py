"""The model that is shown: by name, or from a weights file."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..checkpoint import load_checkpoint
from ..errors import CheckpointError
from ..reader import read
from ..recognise import Recognition, hint, recognise, recognised_part
from ..registry import variants
from .picture import ShowError

RANDOM = "random weights"


def build(name: str | None, checkpoint: str | None, img_size: tuple[int, int] | None) -> tuple[nn.Module, str, str]:
    """(model, its name without a tag, text about its weights).

    img_size  the zoo's models are built for it, timm's if possible; None: their own, or the one that a file shows
    Raises ShowError for an unknown name, and CheckpointError for a file that cannot be read, is not a model of the zoo,
    is not the named model, or does not show how its model is built.
    """
    if checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that pictures of random weights are reproducible
            model = create(name, img_size, pretrained="." in name)
        return model, name.partition(".")[0], f"weights of {name}" if "." in name else RANDOM
    found, part = of_file(checkpoint)
    name = name or found.model
    if name is None:
        raise CheckpointError(f"{checkpoint} is not a model of the zoo, or fits several: name one with model=")
    classes = {} if found.classes is None else {"num_classes": found.classes}
    if call := found.in_python(name.partition(".")[0], **classes):
        raise CheckpointError(
            f"{checkpoint} is of {found.message}, which this command does not take. In Python, {call} takes it, "
            "zoo.load_checkpoint loads the file, and zoo.show.pictures draws"
        )
    options = found.arguments(name.partition(".")[0]) | classes
    own = options.pop("img_size", None)
    model = create(name, img_size or own, **options)
    report = load_checkpoint(model, checkpoint, part=part)
    print(report.message)
    return model, name.partition(".")[0], f"weights of {'/'.join(Path(checkpoint).parts[-4:])}"


def of_file(path: str) -> tuple[Recognition, str | None]:
    """What a file is, and the part of the file that is the model, if it is not the whole."""
    checkpoint = read(path)
    state = checkpoint.first
    found, part = recognise(state, hint(path, checkpoint.meta)), None
    if not found.candidates and (inner := recognised_part(state)):
        part, found = inner
    return found, part


def create(name: str, img_size: int | tuple[int, int] | None, **kwargs: Any) -> nn.Module:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, [*variants(), *timm.list_models()], 3)
        raise ShowError(f"no model is called {architecture}" + (f": did you mean {' or '.join(near)}?" if near else ""))
    if img_size is not None and architecture in variants():
        kwargs["img_size"] = img_size
    model = timm.create_model(name, **kwargs)
    if img_size is not None and architecture not in variants() and hasattr(model, "set_input_size"):
        model.set_input_size(img_size)
    return model
