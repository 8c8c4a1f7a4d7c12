"""Build the model of a configuration from its `model` group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from omegaconf import DictConfig, OmegaConf
from torch import nn

import zoo
from recipes import papers, weights
from recipes.config import ConfigError
from recipes.config.quoting import written
from recipes.console import say
from recipes.data import Data
from recipes.data.build import preprocessing
from recipes.recognised import lacking, left_open, typed
from recipes.settings import load_config
from zoo.checkpoint import part_of, select
from zoo.errors import first_line
from zoo.heads.recognise import recognise_dense
from zoo.reader import Checkpoint
from zoo.recognise import hint, parts, without_prefix
from zoo.releases import Release, candidates, find

# keys of cfg.model that mean something here; the others are arguments of the model's constructor
HANDLED = {"name", "pretrained", "checkpoint", "backbone", "weights", "num_classes", "img_size", "drop_path_rate"}
NOTHING = "there is nothing to evaluate. Give the data that it was trained for"
PARTS = ("head", "channels", "auxiliary")  # keys of cfg.task by which dense models differ
SOURCES = ("file", "url", "hf_hub_id", "hf_hub_filename")  # keys of an overlay that say where weights are
OVERLAY = "pretrained_cfg_overlay=dict(file=...)"  # how a file is given to the zoo outside of recipes

Make = Callable[..., nn.Module]  # called with a name and arguments


def create(
    cfg: DictConfig, data: Data, *, pretrained: bool = True, make: Make = timm.create_model, **head: Any
) -> nn.Module:
    """Build `model.name` for this data and load `model.pretrained` or `model.checkpoint` unless `pretrained=False`.

    make  what builds it; `head` are further arguments of that function, None leaves its default

    If null, `model.img_size` and `model.drop_path_rate` become the data's size and the recipe's rate for models that
    take them. Raises ConfigError for a constructor argument, or a value of one, that the model does not take, for a
    checkpoint of another model, for released weights that are not available, for an overlay that names some without
    `model.pretrained`, and, in an evaluation, for weights without a classifier for these classes; RunError for a folder
    without a checkpoint.
    """
    if pretrained:
        _check_overlay(cfg)
    given = OmegaConf.to_container(cfg.model, resolve=True)
    options = {key: value for key, value in given.items() if key not in HANDLED and value is not None}
    options["num_classes"] = data.num_classes if cfg.model.num_classes is None else cfg.model.num_classes
    options["pretrained"] = bool(cfg.model.pretrained and pretrained)
    wishes = {"img_size": data.img_size, "drop_path_rate": OmegaConf.select(cfg, "train.drop_path_rate")}
    for key in wishes:
        if given.get(key) is not None:
            options[key] = given[key]
    options |= {key: value for key, value in head.items() if value is not None}
    if options.get("in_chans", 3) != 3:
        raise ConfigError(
            f"model.in_chans={options['in_chans']}: all images have three channels here, greyscale ones too. Leave it "
            "out, or give a file of a model for three; models with another number of channels are for your own code"
        )
    model = build(make, cfg.model.name, options, {key: wishes[key] for key in wishes if key not in options})
    if cfg.model.checkpoint is not None and pretrained:
        _load(model, cfg)
    elif options["pretrained"] and "train" not in cfg:
        _check_answers(model, cfg)
    if cfg.model.backbone is not None and pretrained:
        start_backbone(model, cfg.model.backbone, cfg.model.weights)
    if pretrained and "paper" in cfg:
        _say_start(cfg)
    return model


def _check_overlay(cfg: DictConfig) -> None:
    """Raise ConfigError for weights in an overlay that timm does not read without `model.pretrained`."""
    if (given := _overlaid(cfg)) and not cfg.model.pretrained:
        typed = " ".join(f"+model.pretrained_cfg_overlay.{key}={value}" for key, value in given.items())
        raise ConfigError(f"{typed} has no effect with model.pretrained=false: give model.pretrained=true as well")


def _overlaid(cfg: DictConfig) -> dict[str, Any]:
    """Where an overlay says that released weights are, instead of where their release says so."""
    overlay = cfg.model.get("pretrained_cfg_overlay")
    overlay = overlay if isinstance(overlay, DictConfig) else {}
    return {key: overlay[key] for key in SOURCES if overlay.get(key)}


def _say_start(cfg: DictConfig) -> None:
    """Warn if the published training started from weights, and this one from none, or from another release."""
    recipe = papers.recipe(cfg.model.name, cfg.paper.phase, cfg.task.name)
    if recipe.starts is None:
        return
    begins = recipe.starts + (f" ({recipe.release})" if recipe.release else "")
    given = cfg.model.checkpoint or cfg.model.backbone or _overlaid(cfg)
    loaded = find(cfg.model.name) if cfg.model.pretrained and not given else None
    if not (given or cfg.model.pretrained):
        said = "but none are given: the model starts from scratch"
    elif loaded is not None and not _is_start(loaded, recipe, cfg.task.name):
        said = f"but model.pretrained=true loads {loaded.name}, trained on {loaded.data} at {loaded.img_size} pixels"
    else:
        return
    say(f"this recipe of {cfg.model.name} starts from {begins}, {said}. Give {_starts(cfg, recipe)}", "yellow")


def _is_start(loaded: Release, recipe: papers.Recipe, task: str) -> bool:
    """Whether a release is what a recipe starts from; the backbone of a dense model, from any classifier of it."""
    return loaded.name == recipe.release or (recipe.release is None and task != "classify")


def _starts(cfg: DictConfig, recipe: papers.Recipe) -> str:
    """How to start as the recipe does: from its release by name, if it is of this model, or from a file."""
    classify, variant = cfg.task.name == "classify", cfg.model.name.partition(".")[0]
    names = [found.name for found in candidates(variant) if found.loadable]  # the default one first
    release = recipe.release or next((name for name in names if not classify), None)
    file = f"<file of {release}>" if release and release not in names else "<file>"
    other = f"model.checkpoint={file}" if classify else "model.backbone=<run or file>"
    if release not in names:
        return other
    named = f"model.name={release} " if release != names[0] else ""
    return f"{named}model.pretrained=true or {other}"


def check_classes(cfg: DictConfig, data: Data) -> None:
    """Raise ConfigError if a dense model is to have other classes than the data that it is evaluated on."""
    if cfg.model.num_classes not in (None, data.num_classes):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes}: the data has {data.num_classes} classes, and the model is "
            "evaluated on these. Leave it out"
        )


def _load(model: nn.Module, cfg: DictConfig) -> None:
    given, kind = cfg.model.checkpoint, cfg.model.weights
    if weights.names_a_folder(given):
        weights.check_model(given, cfg.model.name)
        _check_task(cfg)
        _say_seen_otherwise(cfg, Path(given))
        found, kind = weights.of_run(given, kind), "auto"  # these alone
    else:
        found = zoo.read(given)
    try:
        report = zoo.load_checkpoint(model, found, weights=kind)
    except zoo.CheckpointError as error:
        raise zoo.CheckpointError(f"{error}{_other_ways(cfg)}") from error
    # an auxiliary head predicts nothing
    if "train" not in cfg and not all(layer.startswith("auxiliary_head.") for layer in report.remade):
        raise ConfigError(f"{report.message}: {NOTHING}")
    say(report.message)
    if "train" in cfg and cfg.task.name != "classify" and not weights.names_a_folder(cfg.model.checkpoint):
        _say_built_otherwise(model, cfg)


def _check_task(cfg: DictConfig) -> None:
    """Raise ConfigError if a dense model is to start from a run of another task, of which only the backbone fits."""
    given, task = cfg.model.checkpoint, load_config(Path(cfg.model.checkpoint)).task.name
    if cfg.task.name != "classify" and task != cfg.task.name:
        raise ConfigError(
            f"the run {given} has task={task}, and this is task={cfg.task.name}: give model.backbone={given} to start "
            "only the backbone from it"
        )


def _other_ways(cfg: DictConfig) -> str:
    """What else to give if model.checkpoint= is not of this dense model; nothing in an evaluation."""
    given = cfg.model.checkpoint
    if cfg.task.name == "classify" or "train" not in cfg:
        return ""
    backbone = f"model.backbone={given}"
    if not weights.names_a_folder(given):
        return f"\nGive {backbone} to start the backbone from a classifier or from another dense model"
    there, here = load_config(Path(given)).task, cfg.task
    other = {key: there[key] for key in PARTS if key in there and there[key] != here[key]}
    typed = " ".join(f"task.{key}={written(value)}" for key, value in other.items())
    return f"\nThe run has {typed}: give the same" + f", or {backbone} to start the backbone alone" if typed else ""


def _check_answers(model: nn.Module, cfg: DictConfig) -> None:
    """Raise ConfigError if timm loaded weights without a classifier for the classes of `model`, which has a new one."""
    name = cfg.model.name
    if cfg.task.name != "classify":
        raise ConfigError(
            f"the weights of {name} are of a backbone, so its {cfg.task.head} starts from scratch: there is nothing to "
            "evaluate. Give checkpoint=<file of the whole model>, or run=runs/<name>"
        )
    known, wanted = model.pretrained_cfg.get("num_classes"), model.num_classes  # of the weights, of the data
    if known != wanted:
        has = f"are for {known} classes" if known else "have no classifier"
        raise ConfigError(f"the weights of {name} {has}, so a new one for {wanted} starts from scratch: {NOTHING}")


def _say_seen_otherwise(cfg: DictConfig, run: Path) -> None:
    """Warn if images are normalised differently from those of the run that weights come from, which harms features."""
    there, here = preprocessing(load_config(run), train=True), preprocessing(cfg, train=True)
    if (there.mean, there.std) != (here.mean, here.std):
        given = " ".join(f"data.{key}={written(getattr(there, key))}" for key in ("mean", "std"))
        say(f"{run} was trained on images with another normalisation than these: {given} restores it", "yellow")


def _say_built_otherwise(model: nn.Module, cfg: DictConfig) -> None:
    """Warn if the backbone of a released file was built differently from this one, into which it loads nevertheless,
    unless that was asked for: windows, as tables show them, DiNAT's dilations, as its authors have them, or
    LITv2's windows, as the name of the file tells.
    """
    path, variant = Path(cfg.model.checkpoint), cfg.model.name.partition(".")[0]
    file, own = zoo.describe(path), zoo.variants().get(variant, {})
    found = recognise_dense(file.first, hint(file))
    if found is None:
        return
    wanted = found.built_with(variant, found.release(path, variant))
    for key, value in left_open(cfg.model, wanted, own).items():
        given = own.get(key) if cfg.model.get(key) is None else cfg.model.get(key)
        if key == "img_size":  # which null leaves to the data, and others have the same windows
            inner = getattr(model.backbone, "model", model.backbone)
            given = inner.args_from_shapes({name: x.shape for name, x in inner.state_dict().items()}).get(key)
        if given != value:
            argument = f"{typed(cfg.model, key)}{written(value)}"
            say(f"{path} is from a model with {argument}, which this one is built without: give it as well", "yellow")
    if said := lacking(cfg.model, found.backbone, variant, f"the backbone of {path}"):
        say(said, "yellow")


def start_backbone(model: nn.Module, given: str, kind: str) -> None:
    """Start the backbone of a dense model from that of a run's best weights, or of a file of any task.

    It may have norms that those lack.

    kind  which weights: "auto", "raw", or "ema"

    Raises ConfigError if the model has no separate backbone; this or CheckpointError for weights of another model.
    """
    if not hasattr(model, "backbone"):
        raise ConfigError(f"model.backbone={given} is for segmentation and detection; use model.checkpoint here")
    if weights.names_a_folder(given):
        found, kind = weights.of_run(given, kind), "auto"  # these alone
    else:
        found = zoo.read(given)
    part = "backbone" if "backbone" in parts(without_prefix(found.first)) else None
    inner = getattr(model.backbone, "model", model.backbone)
    if isinstance(inner, zoo.Backbone):
        said = zoo.load_checkpoint(inner, found, weights=kind, part=part).message
    else:
        said = f"{found.path}, {_copy(inner, part_of(found, part)[0], kind)} weights"
    say(f"the backbone starts from {said}")


def _copy(model: nn.Module, found: Checkpoint, kind: str) -> str:
    """Copy a checkpoint into a timm model without a head, and return which of its weights these are."""
    _, entry, state = select(found, type(model), kind)
    want = model.state_dict()
    if other := [name for name in want if name not in state or state[name].shape != want[name].shape]:
        raise ConfigError(
            f"model.backbone: {found.path} is from another model: {len(other)} tensors of this one's backbone are "
            f"missing or have another shape, such as {other[0]}. If timm itself can read the file, give "
            "model.pretrained=true +model.pretrained_cfg_overlay.file=<file>"
        )
    model.load_state_dict({name: state[name] for name in want})
    return entry


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Let a model compute its blocks again in the backward pass.

    Raises ConfigError for one that cannot, as some of timm's.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"train.grad_checkpointing=true: {name} cannot compute parts of itself again ({error}): leave it out, and "
            "give train.micro_batch=, with which fewer images take memory at a time"
        ) from error


def records_twice(model: nn.Module) -> bool:
    """Whether a model that computes its blocks again records statistics of batch norms both times, as timm's do: those
    in training mode.
    """
    if any(isinstance(module, zoo.Backbone) for module in model.modules()):
        return False
    kind = nn.modules.batchnorm._NormBase  # of batch norms, synchronised or not, timm's as well
    norms = [norm for norm in getattr(model, "backbone", model).modules() if isinstance(norm, kind)]
    return any(norm.training and norm.running_mean is not None for norm in norms)


def build(make: Make, name: str, options: dict[str, Any], wishes: dict[str, Any]) -> nn.Module:
    """Build with as many of the wishes as the model's constructor takes, and report those that it does not take."""
    wishes = {key: value for key, value in wishes.items() if value is not None}
    while True:
        try:
            model = make(name, **options, **wishes)
            # for the model card of the run
            model.created_by, model.created_with = make.__name__, {"model_name": name, **options, **wishes}
            return model
        except TypeError as error:
            # Python's message ends in: argument 'key'; timm's for some families in: argument(s): ['key', 'other']
            refused = [key for key in wishes if "argument" in str(error) and f"'{key}'" in str(error)]
            if not refused:
                raise ConfigError(f"{name} could not be built with {options | wishes}: {error}") from error
            for key in refused:
                say(f"{name} takes no {key}; it is built without it")
                del wishes[key]
        except zoo.CheckpointError as error:
            raise zoo.CheckpointError(str(error).replace(OVERLAY, _as_file(make))) from error
        except OSError as error:  # no network, or no such file on the hub
            if not options.get("pretrained"):
                raise
            raise ConfigError(_not_released(name, error, _as_file(make))) from error
        # timm asserts what a size of images is a multiple of, looks up layers by name, and has models without weights
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise ConfigError(f"{name} could not be built with {options | wishes}: {why}") from error


def _as_file(make: Make) -> str:
    """How released weights are given as a file instead: those for a dense model are its backbone's."""
    return "model.backbone=<file>" if make.__module__.startswith("zoo.heads.") else "model.checkpoint=<file>"


def _not_released(name: str, error: OSError, file: str) -> str:
    return (
        f"the released weights of {name} could not be downloaded: {first_line(error)}\ninstead of pretrained=true, "
        f"give a local file: {file}, or, for a teacher, teacher.checkpoint=<file>"
    )
