"""Every file of weights is opened here: read safely, its layout recognised, its tensors fitted to a model, strictly."""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import adapt_input_conv
from timm.utils import unwrap_model
from torch import Tensor, nn

from .backbone import Backbone
from .blocks import PositionTable, resize_positions, resize_table
from .convert import Layout, listed
from .errors import CheckpointError, printable
from .fetch import locate, warn_of_licence
from .reader import Checkpoint, read
from .recognise import CONV, OURS, layouts_of, parts, recognise, recognised_part, without_prefix
from .registry import class_of
from .releases import RELEASES, find

_logger = logging.getLogger(__name__)

AS_IS = "as is"  # the layout of what is no backbone: its own state dict


@dataclass
class LoadReport:
    """What `load_checkpoint` did.

    layout       the layout that the file was in
    entry        which weights of the file were taken, "raw" or "ema"
    head_remade  the classifier is new: the file has none, not all of it, or one for another number of classes
    new          tensors of what else the file has nothing of and starts from scratch: a head's norm, norms on features
    channels     of the images that the file is for, where they are others than the model's: the first convolution was
                 summed, or repeated and scaled; None where they are the same
    resized      tables of positions that were interpolated: relative ones to other windows, others to other images
    in_order     tables of positions that were read as those of the model's windows or images, which have as many
                 entries: of other sides the file may be, and does not say
    left_out     parts of the file that were not asked for, or that the model was built without, a head under features
                 say, and how many tensors each has
    message      all this in one line
    """

    layout: str = ""
    entry: str = ""
    head_remade: bool = False
    new: list[str] = field(default_factory=list)
    channels: int | None = None
    resized: list[str] = field(default_factory=list)
    in_order: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    message: str = ""


def load_checkpoint(
    model: nn.Module, path: str | Path | Checkpoint, *, weights: str = "auto", part: str | None = None
) -> LoadReport:
    """Load a file into a model of the zoo, or its own state dict into any other model; strict about names and shapes.

    model    may be compiled, or wrapped by DistributedDataParallel or the like, or by timm's features_only=True
    path     a file, or what `zoo.reader.read` made of one
    weights  "raw", "ema" (an average kept beside them), or "auto": those that the figures published for this layout
             belong to, else the raw ones
    part     of a file of several, say a detector's "backbone": read this alone, and report what else there is
    Raises CheckpointError if the file cannot be read or is not of this model; the model is then as it was before.
    ValueError for a model on the meta device.
    """
    model = _unwrapped(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model is on the meta device, without memory for weights: build it on another one")
    given = path if isinstance(path, Checkpoint) else read(path)
    path = given.path
    checkpoint, left_out = part_of(given, part)
    checkpoint, unused = _without_unused(checkpoint, model)
    layout, entry, state = select(checkpoint, type(model), weights, _layouts(model))
    state = dict(state)  # which may be the given one
    channels = _fit_channels(state, model, path)
    report = fit(state, model, layout)
    model.load_state_dict(state, strict=False)  # all names and shapes have been compared
    report.channels, report.layout, report.entry = channels, layout, entry
    report.left_out = left_out | unused | report.left_out
    report.message = _message(report, path, model)
    warn_of_licence(find(filename=path))
    return report


def overlay_with_weights(
    cls: type[Backbone], name: str, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """`pretrained_cfg_overlay` for timm: the weights that `kwargs` asks for, read by us and under our names.

    With it come the entries that these weights displaced, `file` and `source`, where there were any, and the layout
    that the weights were in.
    """
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    if overlay.get("url") or overlay.get("hf_hub_id"):  # goes before every place that the tag has
        overlay = {"url": None, "hf_hub_id": None, "hf_hub_filename": None} | overlay
    cfg = resolve_pretrained_cfg(name, pretrained_cfg=kwargs.get("pretrained_cfg"), pretrained_cfg_overlay=overlay)
    if cfg.state_dict is None:
        checkpoint = read(locate(cfg.to_dict(), name, kwargs.get("cache_dir")))
    else:
        checkpoint = Checkpoint("the given state dict", {"raw": cfg.state_dict})
    layout, entry, state = select(checkpoint, cls, "auto")
    _logger.info("%s: layout %r, %s weights", checkpoint.path, layout, entry)
    overlay |= {"state_dict": state, "file": None, "source": None}
    if "head.fc.weight" in state:
        # timm leaves out a classifier that this number says is for other classes
        overlay["num_classes"] = state["head.fc.weight"].shape[0]
    return overlay, {key: getattr(cfg, key) for key in ("file", "source") if getattr(cfg, key)}, layout


def adapt(
    state: Mapping[str, Tensor], model: nn.Module, *, layout: str = OURS.name, classifies: bool = True
) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: what `overlay_with_weights` gave, with the shapes of `model`.

    timm itself adapts the first convolution to another number of channels afterwards.

    layout      that the weights were in
    classifies  False: the model will lose its classifier anyhow, so that the file has none is not worth a warning

    Raises CheckpointError where the weights are not of this model.
    """
    state = dict(state)
    if isinstance(model, Backbone):
        _check_channels(state, CONV, model, "the checkpoint", model.pretrained_cfg["input_size"][0])
    report = fit(state, model, layout, ignore=(CONV,))
    if not classifies:
        report.head_remade, report.new = False, [name for name in report.new if not name.startswith("head.")]
    fresh = report.head_remade or any(name.startswith("head.") for name in report.new)
    # a head that nobody asked for is no loss
    level = logging.WARNING if fresh or report.left_out.keys() - {"head"} else logging.INFO
    _logger.log(level, "%s", "; ".join(["weights as they are given", *_notes(report, model)]))
    # timm asks for every name: what a file may be without stays as the model has it
    return model.state_dict() | state


def select(
    checkpoint: Checkpoint, cls: type[nn.Module], weights: str, layouts: tuple[Layout, ...] | None = None
) -> tuple[str, str, dict[str, Tensor]]:
    """(layout, "raw" or "ema", tensors under our names) of the entry that is asked for.

    layouts  those that the file may be in; by default those of a backbone's class, or none for what is no backbone
    """
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights is {weights!r}; it must be 'auto', 'raw' or 'ema'")
    states = {kind: without_prefix(state) for kind, state in checkpoint.entries.items()}
    first = next(iter(states))
    if layouts is None and not issubclass(cls, Backbone):
        entry = first if weights == "auto" else weights
        return AS_IS, entry, _entry(states, entry, checkpoint.path)
    layout = _recognise(states[first], layouts or layouts_of(cls), checkpoint.path)
    entry = weights
    if weights == "auto":
        entry = _published(cls, layout)
        entry = entry if entry in states else first
    try:
        return layout.name, entry, layout.to_ours(_entry(states, entry, checkpoint.path))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} is not of this {cls.__name__}: {error}") from error


def part_of(checkpoint: Checkpoint, part: str | None) -> tuple[Checkpoint, dict[str, int]]:
    """The checkpoint with the names of one part alone, and the sizes of the others."""
    if part is None:
        return checkpoint, {}
    entries, left_out = {}, {}
    for kind, state in checkpoint.entries.items():
        state = without_prefix(state)
        left_out = dict(parts(state))
        if left_out.pop(part, None) is None:
            raise CheckpointError(f"{checkpoint.path} has no part {part!r}, only {listed(left_out)}")
        entries[kind] = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
    return Checkpoint(checkpoint.path, entries, checkpoint.meta), left_out


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model without what compiles it, spreads it over devices, or asks it for features alone."""
    model = unwrap_model(model)
    return unwrap_model(model.model) if isinstance(model, FeatureGetterNet) else model


def _layouts(model: nn.Module) -> tuple[Layout, ...] | None:
    """The layouts of what is more than a backbone, a segmenter say; it knows them itself."""
    return model.layouts() if hasattr(model, "layouts") else None


def _without_unused(checkpoint: Checkpoint, model: nn.Module) -> tuple[Checkpoint, dict[str, int]]:
    """The checkpoint without the parts that `model` was built without, and the sizes of these."""
    if not hasattr(model, "unused"):
        return checkpoint, {}
    states = {kind: without_prefix(state) for kind, state in checkpoint.entries.items()}
    unused = {part: count for part, count in parts(next(iter(states.values()))).items() if model.unused(part)}
    entries = {k: {n: t for n, t in state.items() if n.partition(".")[0] not in unused} for k, state in states.items()}
    return Checkpoint(checkpoint.path, entries, checkpoint.meta), unused


def _entry(states: Mapping[str, dict[str, Tensor]], kind: str, path: str) -> dict[str, Tensor]:
    if kind not in states:
        raise CheckpointError(f"{path} has no {kind} weights, only {', '.join(states)}: choose with weights=")
    return states[kind]


def _published(cls: type[Backbone], layout: Layout) -> str:
    """Which entry of a file the figures published for `layout` belong to."""
    kinds = {r.weights for r in RELEASES if r.layout == layout.name and class_of(r.model) is cls}
    return "ema" if kinds == {"ema"} else "raw"


def _recognise(state: Mapping[str, Tensor], layouts: tuple[Layout, ...], path: str) -> Layout:
    """The first layout that has a word for every key."""
    unknown = {layout.name: layout.unknown(state) for layout in layouts}
    for layout in layouts:
        if not unknown[layout.name]:
            return layout
    closest = min(unknown, key=lambda name: len(unknown[name]))
    raise CheckpointError(
        f"{path} is in none of the layouts of this model ({', '.join(unknown)}). {_what_it_is(state)}"
        f"Closest is {closest!r}, which has no name for {listed(unknown[closest])}."
    )


def _what_it_is(state: Mapping[str, Tensor]) -> str:
    found = recognise(state)
    if found.candidates:
        # variants that differ in what has no weights, such as dilations, cannot be told apart by a file
        names = " or ".join(name for name, _ in found.candidates)
        return f"It holds {names} in layout {found.candidates[0][1]!r}. "
    if inner := recognised_part(state):
        part, within = inner
        others = sorted(parts(state).keys() - {part})
        without = f" without {listed(others)}" if others else ""
        command = f"For a command python -m zoo.convert IN OUT --part {part} writes it alone. "
        return f"Its part {part!r} is {within.message}; part={part!r} reads it{without}. {command}"
    return ""


def fit(
    state: dict[str, Tensor], model: nn.Module, layout: str = OURS.name, ignore: tuple[str, ...] = ()
) -> LoadReport:
    """Bring `state` to the shapes of `model` in place: resize tables, drop what it was built without and a classifier
    for other classes.

    layout  that the file was in
    ignore  tensors of any shape
    Raises CheckpointError where names, shapes or types differ in any other way, or values are not finite, or would not
    be in the types of `model`.
    """
    want, classifier = model.state_dict(), _classifier(model)
    headless = not any(k.startswith(("head.", *classifier)) for k in state)
    report = LoadReport(left_out=_leave_out(state, want, model))
    for layer in classifier:
        theirs, ours = ({k: v.shape for k, v in tensors.items() if k.startswith(layer)} for tensors in (state, want))
        for name in theirs if theirs != ours else ():  # part of it would be no classifier
            del state[name]
    for name, module in model.named_modules():
        key = f"{name}.rpb"
        both = hasattr(module, "resize") and key in state and key in want
        if both and state[key].shape[0] == module.heads and state[key].shape != want[key].shape:
            if _may_be_flat(state[key], layout) and state[key].numel() == want[key].numel():
                state[key] = state[key].reshape(want[key].shape)
                report.in_order.append(key)
            elif state[key].dim() == 3:
                state[key] = resize_table(state[key], tuple(want[key].shape[1:]), module.resize)
                report.resized.append(key)
        if isinstance(module, PositionTable):
            _fit_positions(state, f"{name}.table", module, layout, report)
    lacks = [k for k in want if k not in state and not k.endswith("num_batches_tracked")]
    report.head_remade = any(k.startswith(classifier) for k in lacks)
    lacks = [k for k in lacks if not k.startswith(classifier)]
    report.new = [k for k in lacks if _may_be_new(k, state, headless)]
    _compare(state, want, sorted({*lacks} - {*report.new}), ignore, type(model).__name__)
    return report


def _leave_out(state: dict[str, Tensor], want: Mapping[str, Tensor], model: nn.Module) -> dict[str, int]:
    """Take out of `state` what a backbone was built without, or lost when it was cut down to features; their sizes."""
    parts = {k: re.match(r"stages\.\d+|[^.]*", k)[0] for k in state if k not in want and isinstance(model, Backbone)}
    left_out = {name: part for name, part in parts.items() if _is_without(model, part)}
    for name in left_out:
        del state[name]
    return dict(Counter(left_out.values()))


def _is_without(model: Backbone, part: str) -> bool:
    cut = [f"stages.{i}" for i in range(len(model.stages), len(model.feature_info))]
    return part == "feature_norms" or part in cut or (part == "head" and model.num_classes == 0)


def _may_be_new(name: str, state: Mapping[str, Tensor], headless: bool) -> bool:
    """Weights for dense prediction have no head at all, weights for classification no norms on features, or others."""
    if name.startswith("feature_norms."):
        norm = name.rpartition(".")[0]
        return not any(k.startswith(f"{norm}.") for k in state)
    return headless and name.startswith("head.")


def _may_be_flat(table: Tensor, layout: str) -> bool:
    """Whether a table comes from a file that does not say its sides: 10 x 8 and 8 x 10 have as many entries.

    Conversion makes a square one of those that could be, of windows of 1 x 5 as well.
    """
    return table.dim() == 2 or (table.shape[1] == table.shape[2] and layout not in (OURS.name, AS_IS))


def _fit_positions(state: dict[str, Tensor], key: str, module: PositionTable, layout: str, report: LoadReport) -> None:
    """Bring a table of absolute positions to the grid of `module`; a file does not say its own, but all are square.

    Only what a model itself wrote may be of a grid like this one, not square and with as many entries as a square one.
    """
    table = state.get(key)
    if table is None or table.dim() != 3:
        return
    entries, side = table.shape[1], math.isqrt(table.shape[1])
    if side * side != entries or tuple(module.grid) == (side, side):
        return
    if layout in (OURS.name, AS_IS) and entries == module.table.shape[1]:
        report.in_order.append(key)
        return
    state[key] = resize_positions(table, (side, side), module.grid)
    report.resized.append(key)


def _fit_channels(state: dict[str, Tensor], model: nn.Module, what: str) -> int | None:
    """Make the first convolution of the backbone in `state` one for the channels of the model's; its own, if others."""
    found = None
    for name, module in model.named_modules():
        key = f"{name}.{CONV}" if name else CONV
        shape = state[key].shape if isinstance(module, Backbone) and key in state else ()
        if len(shape) == 4 and shape[1] != module.in_chans:
            _check_channels(state, key, module, what)
            state[key], found = adapt_input_conv(module.in_chans, state[key]), shape[1]
    return found


def _check_channels(state: Mapping[str, Tensor], key: str, model: Backbone, what: str, channels: int = 3) -> None:
    """Raise CheckpointError where the first convolution is neither for the model's channels nor for `channels`.

    timm makes one for another number of those alone that it is told of.
    """
    shape = state[key].shape if key in state else ()
    if len(shape) == 4 and shape[1] not in (channels, model.in_chans):
        raise CheckpointError(f"{what} is for images of {shape[1]} channels, which cannot be made {model.in_chans}")


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's parameters."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier", "head.fc" if isinstance(model, Backbone) else ())
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names or ()))


def _compare(
    state: Mapping[str, Tensor], want: Mapping[str, Tensor], missing: list[str], ignore: tuple[str, ...], what: str
) -> None:
    left = [k for k in state if k not in want]
    other = [k for k in state if k in want and state[k].shape != want[k].shape and k not in ignore]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(want[k].shape)}" for k in other]
    # values of a quantised file mean nothing without its scales
    floating = [k for k in state if k in want and want[k].is_floating_point() and want[k].dtype != state[k].dtype]
    integers = [_typed(k, state[k]) for k in floating if not state[k].is_floating_point()]
    bytewise = [_typed(k, state[k]) for k in floating if state[k].is_floating_point() and state[k].itemsize == 1]
    parts = ((missing, "missing"), (left, "left over"), (shapes, "of another shape"))
    parts += ((integers, "of integers"), (bytewise, "of 8 bits"))
    if said := "; ".join(f"{len(names)} {how}: {listed(names)}" for names, how in parts if names):
        raise CheckpointError(f"the checkpoint is not of this {what}. {_what_it_is(state)}{said}.")
    if lost := [k for k, v in state.items() if not v.is_meta and not v.isfinite().all()]:
        raise CheckpointError(
            f"the checkpoint has NaN or infinity in {len(lost)} of {len(state)} tensors: {listed(lost)}. Its training "
            f"had diverged, or the file is damaged: take an earlier one, or download it again."
        )
    narrow = [k for k in floating if torch.finfo(want[k].dtype).max < torch.finfo(state[k].dtype).max]
    if lost := [k for k in narrow if not state[k].is_meta and not state[k].to(want[k].dtype).isfinite().all()]:
        raise CheckpointError(
            f"the checkpoint has values too large for the types of this {what} in {len(lost)} of {len(state)} tensors: "
            f"{listed(_typed(k, want[k]) for k in lost)}. Build the model in float32 or bfloat16."
        )


def _typed(name: str, tensor: Tensor) -> str:
    return f"{name} {str(tensor.dtype).removeprefix('torch.')}"


def _message(report: LoadReport, path: str | Path, model: nn.Module) -> str:
    read_as = f"{path}: layout {report.layout!r}, {report.entry} weights"
    return printable("; ".join([read_as, *_notes(report, model)]))


def _notes(report: LoadReport, model: nn.Module) -> list[str]:
    """What is to be said of a report beside layout and weights."""
    notes = []
    if report.head_remade:
        notes.append(
            f"it has no classifier for {getattr(model, 'num_classes', '?')} classes, so a new one starts from scratch"
        )
    if report.new:
        notes.append(f"it has no {listed(report.new)}: new, from scratch")
    if report.channels:
        notes.append(f"its first convolution, for images of {report.channels} channels, was made one for the model's")
    if report.resized:
        notes.append(f"tables of positions interpolated to other windows or images: {len(report.resized)}")
    if report.in_order:
        notes.append(
            f"tables of positions taken for those of this model's windows or images, though the file may be of others "
            f"with as many: {len(report.in_order)}"
        )
    if report.left_out:
        notes.append(f"left out: {', '.join(f'{part} ({count} tensors)' for part, count in report.left_out.items())}")
    return notes
