"""What `zoo.export` takes, as a model: a weights file, a folder, or a name of timm's."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .beside import CONFIG, locate
from .checkpoint import load_checkpoint, only_part, part_of
from .errors import CheckpointError
from .fetch import fetching, releases_in
from .files import is_file, is_folder, unreadable
from .heads import segmenter
from .heads.recognise import KINDS, DenseRecognition, recognise_dense, task_of_own
from .reader import Checkpoint, read
from .recognise import Recognition, State, hint, part_hint, recognise

DENSE = 512  # default side, in pixels, of the images of released segmenters
UNKNOWN = "{path} matches no known release: what it says about preprocessing is what {model} has without a file"


def build(
    source: str, *, model: str | None = None, weights: str = "auto", features: Sequence[int] | None = None
) -> nn.Module:
    """The model that a file, a folder or a timm name stands for, in evaluation mode.

    features  stages whose maps it returns instead of logits; empty: those of all stages
    Raises CheckpointError if a file is not recognised or cannot be read, and for a folder or a name that timm does not
    know.
    """
    try:
        return _built(Path(source), source, model, weights, features)
    except PermissionError as error:
        raise CheckpointError(unreadable(error.filename or source, error)) from error


def _built(path: Path, source: str, model: str | None, weights: str, features: Sequence[int] | None) -> nn.Module:
    create = timm.create_model if features is None else partial(_of_features, tuple(features))
    if is_file(path):
        _, origin = locate(path)
        if origin is None:
            return _from_file(create, path, model, weights).eval()
        if origin.source.name == CONFIG:  # no tensor shows all arguments: windows of DaViT, dilations, regions
            run = origin.source.parent
            raise CheckpointError(f"{path} is of a run: python -m recipes.export {run} OUT exports its model")
        path = path.parent
    if is_folder(path):
        if is_file(path / "config.yaml"):
            raise CheckpointError(
                f"{path} is the folder of a run: python -m recipes.export {path} OUT exports its model"
            )
        if not is_file(path / "config.json"):
            raise CheckpointError(f"{path} is a folder without config.json: expected one that zoo.save_for_hf wrote")
        _refuse(source, model, weights)
        return create(f"local-dir:{path}", pretrained=True).eval()
    name, _, tag = source.partition(".")
    if not timm.is_model(name):
        raise CheckpointError(f"{source} is neither a file, nor a folder, nor a model of timm or the zoo")
    try:
        timm.get_pretrained_cfg(source)
    except RuntimeError as error:
        raise CheckpointError(f"{source} is neither a file, nor a folder, nor a pretrained tag of {name}") from error
    _refuse(source, model, weights)
    with fetching(source):
        model = create(source, pretrained=bool(tag)).eval()
    model.of_release = bool(tag)
    return model


def _refuse(source: str, model: str | None, weights: str) -> None:
    if model is not None or weights != "auto":
        raise CheckpointError(f"{source} says itself what it is: --model and --weights are for other files of weights")


def _of_features(stages: tuple[int, ...], name: str, **kwargs: Any) -> nn.Module:
    try:
        model = timm.create_model(name, features_only=True, **({"out_indices": stages} if stages else {}), **kwargs)
    except (AssertionError, IndexError) as error:  # what timm raises for a stage that does not exist
        raise CheckpointError(f"{name} has no features of stages {list(stages)}: {error}") from error
    info = model.feature_info
    given = [index % len(info.info) for index in info.out_indices]
    if given != sorted(set(given)):  # it would describe them as asked for, and return each once, fine to coarse
        raise CheckpointError(f"features of stages {list(stages)}: name each stage once, the finest first")
    return model


def _from_file(create: Callable[..., nn.Module], path: Path, model: str | None, weights: str) -> nn.Module:
    given = read(path)
    checkpoint, _ = part_of(given, only_part(given))
    state = checkpoint.first
    dense = recognise_dense(state, hint(checkpoint))
    if dense and dense.task == "segment" and create is timm.create_model:
        return _segmenter_from_file(dense, given, model, weights)
    if said := _dense_not_taken(dense, state, path):
        raise CheckpointError(said)
    found = recognise(state, hint(checkpoint))
    name = model or found.model
    if name is None:
        raise CheckpointError(f"{path}: {found.message}{part_hint(state, path) or '. Give --model'}")
    classes = {} if found.classes is None else {"num_classes": found.classes}
    if call := found.in_python(name, **classes):
        raise CheckpointError(_written_by(path, found, call))
    fits, named = releases_in(path, checkpoint.meta, found, name)
    built = create(fits[0].name if fits else name, **classes, **found.arguments(name))
    if not fits:
        print(UNKNOWN.format(path=path, model=name))
    else:
        print(f"{path} is exported as {fits[0].name}{'' if named else ', judging by its tensors'}")
        if not named:  # of releases with the same tensors, another may be meant, and the licences differ
            built.pretrained_cfg["license"] = None
    print(load_checkpoint(built, given, weights=weights).message)
    return built


def _dense_not_taken(found: DenseRecognition | None, state: State, path: Path) -> str | None:
    """Why a whole detector, or a segmenter that was not built so far, is not exported; None for any other file.

    found  what it is in the names of mmseg or mmdet; None if it has others
    """
    task = found.task if found else task_of_own(state)
    if task is None:
        return None
    what = f"{path} is a {KINDS[task]}" + (f", {found.message}" if found else " in the zoo's names")
    if task == "detect":
        return f"{what}: detectors are not exported, as the number of boxes varies per image{part_hint(state, path)}"
    if found:
        return f"{what}, whose maps this command does not export{part_hint(state, path)}"
    return (
        f"{what}, which do not say all of how it is built: export that of a run with python -m recipes.export RUN OUT; "
        "else load the file into a model and call zoo.export.export"
    )


def _written_by(path: Path, found: Recognition, call: str) -> str:
    """For messages: how to export, in Python, a file whose model this command cannot build."""
    return (
        f"{path} is of {found.message}, which this command does not take. In Python, {call} takes it, "
        "zoo.load_checkpoint loads the file, and zoo.export.export writes the model"
    )


def _segmenter_from_file(found: DenseRecognition, given: Checkpoint, model: str | None, weights: str) -> nn.Module:
    """A segmenter without the auxiliary head, which only training uses."""
    path, name = Path(given.path), model or found.backbone.model
    if name is None:
        raise CheckpointError(f"the backbone of {path} is {found.backbone.message}. Give --model")
    arguments = {"num_classes": found.classes, "head": found.head, **found.options}
    if call := found.backbone.in_python(name, "zoo.heads.segmenter", **arguments):
        raise CheckpointError(_written_by(path, found.backbone, call))
    release = found.release(path, name)
    built = segmenter(
        name,
        found.classes,
        head=found.head,
        channels=found.options["channels"],
        auxiliary=False,
        **found.built_with(name, release),
    )
    built.pretrained_cfg["input_size"] = (3, DENSE, DENSE)
    if release is None:
        print(UNKNOWN.format(path=path, model=name))
    else:
        built.pretrained_cfg |= {key: release.cfg()[key] for key in ("mean", "std", "license")}
    print(load_checkpoint(built, given, weights=weights).message)
    return built
