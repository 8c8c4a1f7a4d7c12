"""Loading of weights: a file is read safely, its layout recognised, and its tensors put into a model, strictly."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from timm.models import FeatureGraphNet, FeatureHookNet, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.utils import unwrap_model
from torch import Tensor, nn

from .backbone import Backbone
from .convert import Layout
from .errors import CheckpointError, listed, printable
from .fetch import locate, warn_of_file
from .fitting import LoadReport, check_channels, classifier_of, fit, fit_channels
from .heads.features import OverBackbone
from .reader import Checkpoint, Description, read, where
from .recognise import AS_IS, CONV, OURS, layouts_of, parts, sole_part, what_it_is, without_prefix
from .registry import class_of
from .releases import RELEASES

File = TypeVar("File", Checkpoint, Description)
_logger = logging.getLogger(__name__)

DENSE = {"mmseg": "segmentation", "mmdet": "detection"}  # what whole models in these layouts are for


def load_checkpoint(
    model: nn.Module, path: str | Path | Checkpoint, *, weights: str = "auto", part: str | None = None
) -> LoadReport:
    """Load a file into a model of the zoo, or its own state dict into any other model; strict about names and shapes.

    model    may be compiled, as a whole or block by block, or wrapped by DistributedDataParallel or the like, or by
             timm's features_only=True
    path     a file, or what `zoo.read` returned for one
    weights  "raw", "ema" (an average kept beside them), or "auto": those that the published results of this layout
             belong to, else the raw ones
    part     read only this part of the file, such as a detector's "backbone", and report the others; a backbone that is
             all of the file is found
    Raises CheckpointError if the file cannot be read or does not fit this model, which then stays unchanged, and
    ValueError for a model on the meta device.
    """
    model = unwrapped(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model is on the meta device, without memory for weights: build it on another one")
    given = path if isinstance(path, Checkpoint) else read(path)
    path = given.path
    if part is None and isinstance(model, Backbone):
        part = only_part(given, type(model))
    checkpoint, left_out = part_of(given, part)
    checkpoint, unused = _without_unused(checkpoint, model)
    try:
        layouts = model.layouts() if isinstance(model, OverBackbone) else None
        layout, entry, state = select(checkpoint, type(model), weights, layouts)
        state = dict(state)  # a copy: it may be the given one
        with uncompiled(model):
            if isinstance(model, OverBackbone):
                model.adopt(state)
            channels = fit_channels(state, model, path)
            report = fit(state, model, layout)
            model.load_state_dict(state, strict=False)  # all names and shapes have been compared
    except CheckpointError as error:
        if advice := _advice(checkpoint, model):
            raise CheckpointError(f"{error} {advice}") from error
        raise
    report.channels, report.layout, report.entry = channels, layout, entry
    report.others = _others(layout, model)
    report.left_out = left_out | unused | report.left_out
    report.message = _message(report, checkpoint, part, model)
    warn_of_file(path, checkpoint.meta, checkpoint.first)
    return report


def overlay_with_weights(
    cls: type[Backbone], name: str, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """`pretrained_cfg_overlay` for timm: the weights that `kwargs` asks for, read by the zoo and under its names.

    Also returns the entries that these weights displaced (`file` and `source`, if there were any) and the layout that
    the weights were in.
    """
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    if overlay.get("url") or overlay.get("hf_hub_id"):  # takes precedence over every source of the tag
        overlay = {"url": None, "hf_hub_id": None, "hf_hub_filename": None} | overlay
    cfg = resolve_pretrained_cfg(name, pretrained_cfg=kwargs.get("pretrained_cfg"), pretrained_cfg_overlay=overlay)
    if cfg.state_dict is None:
        checkpoint = read(locate(cfg.to_dict(), name, kwargs.get("cache_dir")))
    else:
        checkpoint = Checkpoint("the given state dict", {"raw": cfg.state_dict})
    part = only_part(checkpoint, cls)
    checkpoint, _ = part_of(checkpoint, part)
    layout, entry, state = select(checkpoint, cls, "auto")
    _tell(checkpoint, part, layout, entry, _published(cls, layout))
    warn_of_file(checkpoint.path, checkpoint.meta, checkpoint.first)
    overlay |= {"state_dict": state, "file": None, "source": None}
    if "head.fc.weight" in state and state["head.fc.weight"].dim():
        # timm leaves out a classifier if this number is not the model's
        overlay["num_classes"] = state["head.fc.weight"].shape[0]
    return overlay, {key: getattr(cfg, key) for key in ("file", "source") if getattr(cfg, key)}, layout


def adapt(
    state: Mapping[str, Tensor],
    model: nn.Module,
    *,
    layout: str = OURS.name,
    classifies: bool = True,
    strict: bool = True,
) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: adapts what `overlay_with_weights` returned to the shapes of `model`.

    timm itself adapts the first convolution to another number of channels afterwards.

    layout      the layout that the weights were in
    classifies  False: the model will lose its classifier anyway, so a file without one is not worth a warning
    strict      False: whatever the file lacks is newly initialised, with a warning

    Raises CheckpointError where the weights do not fit this model.
    """
    state = dict(state)
    if isinstance(model, Backbone):
        check_channels(state, CONV, model, "the checkpoint", model.pretrained_cfg["input_size"][0])
    report = fit(state, model, layout, ignore=(CONV,), strict=strict)
    report.others = _others(layout, model)
    if not classifies:
        report.head_remade, report.remade = False, []
        report.new = [name for name in report.new if not name.startswith("head.")]
    # weights for classification have no norms on features
    lacking = [name for name in report.new if not name.startswith("feature_norms.")]
    fresh = report.head_remade or report.others or lacking
    unlike = _other_dilations(report, model)
    # leaving out a head that was not asked for is no loss
    level = logging.WARNING if fresh or unlike or report.left_out.keys() - {"head"} else logging.INFO
    _logger.log(level, "%s", "; ".join(["pretrained weights", *_notes(report, model)]))
    # timm expects every name: what the file lacks stays as the model has it
    return model.state_dict() | state


def select(
    checkpoint: Checkpoint, cls: type[nn.Module], weights: str, layouts: tuple[Layout, ...] | None = None
) -> tuple[str, str, dict[str, Tensor]]:
    """(layout, "raw" or "ema", tensors under our names) of the entry that `weights` asks for.

    layouts  the layouts that the file may be in; default: those of a backbone's class, none for any other model
    """
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights is {weights!r}; it must be 'auto', 'raw' or 'ema'")
    states = _states(checkpoint)
    first = next(iter(states))
    if layouts is None and not issubclass(cls, Backbone):
        entry = first if weights == "auto" else weights
        return AS_IS, entry, _entry(states, entry, checkpoint.path)
    layout = _recognise(states[first], layouts or layouts_of(cls), checkpoint.path)
    entry = weights
    if weights == "auto":
        entry = _published(cls, layout.name) or "raw"
        entry = entry if entry in states and first != "ema" else first
    try:
        return layout.name, entry, layout.to_ours(_entry(states, entry, checkpoint.path))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this {cls.__name__}: {error}") from error


def part_of(checkpoint: File, part: str | None) -> tuple[File, dict[str, int]]:
    """The checkpoint reduced to one part, of those entries that have it, and the sizes of the others."""
    if part is None:
        return checkpoint, {}
    states = _states(checkpoint)
    having = {kind: parts(state) for kind, state in states.items() if part in parts(state)}
    if not having:
        raise CheckpointError(
            f"{checkpoint.path} has no part {part!r}, only {listed(parts(next(iter(states.values()))))}"
        )
    start = f"{part}."
    entries = {
        kind: {k.removeprefix(start): v for k, v in states[kind].items() if k.startswith(start)} for kind in having
    }
    left_out = dict(next(iter(having.values())))
    del left_out[part]
    return replace(checkpoint, entries=entries), left_out


def only_part(checkpoint: Checkpoint | Description, cls: type[Backbone] | None = None) -> str | None:
    """The `sole_part` of a file.

    cls  the model that the file is for, if known: then it need not be one of the variants, only have such names
    """
    state = without_prefix(checkpoint.first)
    if cls is not None and len(names := parts(state)) == 1:
        (part,) = names
        inner = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items()}
        whole, cut = (any(not layout.unknown(named) for layout in layouts_of(cls)) for named in (state, inner))
        if whole or cut:
            return None if whole else part
    return sole_part(state)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrappers: torch.compile's, DistributedDataParallel's and the like, timm's for features."""
    model = unwrap_model(model)
    if isinstance(model, FeatureHookNet) and "body" in model:
        return unwrap_model(model["body"])
    return unwrap_model(model.model) if isinstance(model, FeatureGetterNet) else model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within it, parts that torch.compile wrapped are what they were, so that their names are those of the others."""
    inner = [
        (parent, name, child, child._orig_mod)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if "_orig_mod" in child._modules
    ]
    for parent, name, _, original in inner:
        parent._modules[name] = original
    try:
        yield
    finally:
        for parent, name, child, _ in inner:
            parent._modules[name] = child


def _without_unused(checkpoint: Checkpoint, model: nn.Module) -> tuple[Checkpoint, dict[str, int]]:
    """The checkpoint without the parts that `model` was built without, and the sizes of these."""
    if not isinstance(model, OverBackbone):
        return checkpoint, {}
    states = _states(checkpoint)
    unused = {part: count for part, count in parts(next(iter(states.values()))).items() if model.unused(part)}
    entries = {k: {n: t for n, t in state.items() if n.partition(".")[0] not in unused} for k, state in states.items()}
    return replace(checkpoint, entries=entries), unused


def _advice(checkpoint: Checkpoint, model: nn.Module) -> str:
    """The advice of a graph, or of a model that is more than a backbone, on a file that does not fit it."""
    if isinstance(model, FeatureGraphNet):
        return "A graph (feature_cls='fx') takes weights as it is built: pretrained_cfg_overlay=dict(file=...)"
    return model.advice(without_prefix(checkpoint.first)) if isinstance(model, OverBackbone) else ""


def _states(checkpoint: Checkpoint | Description) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file by kind, their names without prefixes."""
    return {kind: without_prefix(state) for kind, state in checkpoint.entries.items()}


def _entry(states: Mapping[str, dict[str, Tensor]], kind: str, path: str) -> dict[str, Tensor]:
    if kind not in states:
        raise CheckpointError(f"{path} has no {kind} weights, only {', '.join(states)}: choose other weights")
    return states[kind]


def _published(cls: type[Backbone], layout: str) -> str | None:
    """Which entry of a file the published results of `layout` belong to; None: there are none, or of either."""
    kinds = {r.weights for r in RELEASES if r.layout == layout and class_of(r.model) is cls}
    return kinds.pop() if len(kinds) == 1 else None


def _recognise(state: Mapping[str, Tensor], layouts: tuple[Layout, ...], path: str) -> Layout:
    """The first layout that has a rule for every key."""
    unknown = {layout.name: layout.unknown(state) for layout in layouts}
    for layout in layouts:
        if not unknown[layout.name]:
            return layout
    closest = min(unknown, key=lambda name: len(unknown[name]))
    raise CheckpointError(
        f"{path} is in none of the layouts of this model ({', '.join(unknown)}). {what_it_is(state)}"
        f"Closest is {closest!r}, which has no name for {listed(unknown[closest])}."
    )


def _others(layout: str, model: nn.Module) -> str:
    """`LoadReport.others`."""
    known = layouts_of(type(model)) if isinstance(model, Backbone) else ()
    models = next((one.models for one in known if one.name == layout), "")
    cfg = getattr(model, "pretrained_cfg", {})  # a model that timm did not build has none, and no name
    return models if models and not cfg.get("architecture", models).startswith(models) else ""


def _other_dilations(report: LoadReport, model: nn.Module) -> str:
    """What there is to say of a file of a dense DiNAT, where the model has a classifier's dilations."""
    task = DENSE.get(report.layout.partition("-")[0])
    backbone = getattr(getattr(model, "backbone", None), "model", None) if task else model
    own = getattr(backbone, "dilations", "")
    if not str(own).startswith("classification"):
        return ""
    if task:
        return f"the authors' are built with dilations={task!r}, which no tensor shows, and this model is not"
    said = "of a backbone for dense prediction: the authors' dilations for that, which no tensor shows, are not"
    return f"{said} {own!r}, as this model's: give dilations=" if report.dense else ""


def _message(report: LoadReport, checkpoint: Checkpoint, part: str | None, model: nn.Module) -> str:
    return printable("; ".join([_read_as(checkpoint, part, report.layout, report.entry), *_notes(report, model)]))


def _tell(checkpoint: Checkpoint, part: str | None, layout: str, entry: str, published: str | None) -> None:
    """Log which weights of a file were taken: a warning if it has others, and none that are `published` decide."""
    others = [kind for kind in checkpoint.entries if kind != entry]
    said = [_read_as(checkpoint, part, layout, entry)]
    said += [f"for its {kind} weights use zoo.load_checkpoint(model, file, weights={kind!r})" for kind in others]
    level = logging.WARNING if others and published is None else logging.INFO
    _logger.log(level, "%s", printable("; ".join(said)))


def _read_as(checkpoint: Checkpoint, part: str | None, layout: str, entry: str) -> str:
    which = "" if part is None else f", part {part!r}"
    return f"{checkpoint.path}{which}: layout {layout!r}, {entry} weights{where(checkpoint, entry)}"


def _notes(report: LoadReport, model: nn.Module) -> list[str]:
    """What there is to say about a report besides layout and weights."""
    notes = []
    if report.head_remade:
        classes = f"{getattr(model, 'num_classes', '?')} classes"
        notes.append(
            f"no classifier for {classes} in the file: a new one is initialised"
            if len(report.remade) == len(classifier_of(model))
            else f"not in the file for {classes}, and newly initialised: {listed(report.remade)}"
        )
    if report.new:
        notes.append(f"not in the file, newly initialised: {listed(report.new)}")
    if report.channels:
        notes.append(f"first convolution, for images of {report.channels} channels, converted to the model's channels")
    if report.resized:
        notes.append(f"position tables interpolated to other windows or image sizes: {len(report.resized)}")
    if report.in_order:
        notes.append(
            f"position tables read as they are, though the file may be for other windows or image sizes with as many "
            f"entries: {len(report.in_order)}"
        )
    if report.others:
        name = model.pretrained_cfg["architecture"]
        notes.append(f"of a model called {report.others}..., from which {name} differs in what has no weights")
    if other := _other_dilations(report, model):
        notes.append(other)
    if report.left_out:
        notes.append(f"left out: {', '.join(f'{part} ({count} tensors)' for part, count in report.left_out.items())}")
    return notes
