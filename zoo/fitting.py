"""Fits tensors under our names to a model: adapts their shapes, and checks names and values strictly."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .backbone import Backbone
from .blocks import PositionTable, resize_positions, resize_table
from .errors import CheckpointError, listed
from .recognise import AS_IS, CONV, OURS, is_table, what_it_is

COUNTER = "num_batches_tracked"  # of batch norms


@dataclass
class LoadReport:
    """What `load_checkpoint` did.

    layout       the layout that the file was in
    entry        which weights of the file were taken, "raw" or "ema"
    head_remade  the classifier is new: the file has none, not all of it, or one for another number of classes
    remade       the layers of the classifier that are new; a detector has several, and a segmenter's auxiliary head one
    new          other tensors that the file lacks and that are newly initialised: a head's norm, norms on features
    channels     channels of the file's images where they differ from the model's: the first convolution was summed, or
                 repeated and scaled; None where they are the same
    resized      position tables that were interpolated: relative ones to other windows, absolute ones to other images
    in_order     position tables that were read as those of the model's windows or images, since they have as many
                 entries: the file does not say whether its own have other sides
    left_out     parts of the file that were not asked for or that the model was built without, such as the head of a
                 model of features, and how many tensors each has
    dense        the file is of a backbone for dense prediction: it has norms on features, and no head
    others       what the names of the models begin with that the file is of, by its layout, where the model's does not:
                 "dinat_", for a NAT; they differ in what has no weights
    message      all this in one line
    """

    layout: str = ""
    entry: str = ""
    head_remade: bool = False
    remade: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    channels: int | None = None
    resized: list[str] = field(default_factory=list)
    in_order: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    dense: bool = False
    others: str = ""
    message: str = ""


def fit(
    state: dict[str, Tensor],
    model: nn.Module,
    layout: str = OURS.name,
    ignore: tuple[str, ...] = (),
    strict: bool = True,
) -> LoadReport:
    """Adapt `state` in place to the shapes of `model`: resize tables, drop what it was built without and a classifier
    for other classes.

    layout  the layout that the file was in
    ignore  convolutions that may be for other channels
    strict  False: tensors of `model` that the file lacks are new, whichever they are
    Raises CheckpointError where names, shapes or types differ in any other way, or where values are not finite, or
    would not be in the types of `model`.
    """
    want, classifier = model.state_dict(), classifier_of(model)
    headless = not any(k.startswith(("head.", *classifier)) for k in state)
    dense = headless and any(k.startswith("feature_norms.") for k in state)
    report = LoadReport(left_out=_leave_out(state, want, model), dense=dense)
    for layer in classifier:
        theirs, ours = ({k: v.shape for k, v in tensors.items() if k.startswith(layer)} for tensors in (state, want))
        for name in theirs if theirs != ours else ():  # a part of it is not a classifier
            del state[name]
    for name, module in model.named_modules():
        key = f"{name}.rpb"
        both = hasattr(module, "resize") and key in state and key in want and is_table(key, state[key].shape)
        if both and state[key].shape[0] == module.heads and state[key].shape != want[key].shape:
            if _may_be_flat(state[key], layout) and state[key].numel() == want[key].numel():
                state[key] = state[key].reshape(want[key].shape)
                report.in_order.append(key)
            elif state[key].dim() == 3:
                state[key] = resize_table(state[key], tuple(want[key].shape[1:]), module.resize)
                report.resized.append(key)
        if isinstance(module, PositionTable):
            _fit_positions(state, f"{name}.table", module, layout, report)
    lacks = [k for k in want if k not in state and not k.endswith(COUNTER)]
    frozen = [k for k in state if k not in want and k.endswith(COUNTER) and k.replace(COUNTER, "running_mean") in want]
    for counter in frozen:  # timm's frozen batch norms count no batches
        del state[counter]
    report.remade = [layer.rstrip(".") for layer in classifier if any(k.startswith(layer) for k in lacks)]
    report.head_remade = bool(report.remade)
    lacks = [k for k in lacks if not k.startswith(classifier)]
    report.new = [k for k in lacks if not strict or _may_be_new(k, state, headless)]
    _compare(state, want, sorted({*lacks} - {*report.new}), ignore, model, layout)
    return report


def _leave_out(state: dict[str, Tensor], want: Mapping[str, Tensor], model: nn.Module) -> dict[str, int]:
    """Remove from `state` what a backbone was built without or lost when it was cut down to features; their sizes."""
    parts = {k: re.match(r"stages\.\d+|[^.]*", k)[0] for k in state if k not in want and isinstance(model, Backbone)}
    left_out = {name: part for name, part in parts.items() if _is_without(model, part)}
    for name in left_out:
        del state[name]
    return dict(Counter(left_out.values()))


def _is_without(model: Backbone, part: str) -> bool:
    cut = [f"stages.{i}" for i in range(len(model.stages), len(model.feature_info))]
    return part == "feature_norms" or part in cut or (part == "head" and model.num_classes == 0)


def _may_be_new(name: str, state: Mapping[str, Tensor], headless: bool) -> bool:
    """Weights for dense prediction have no head, weights for classification no norms on features, or fewer of them."""
    if name.startswith("feature_norms."):
        norm = name.rpartition(".")[0]
        return not any(k.startswith(f"{norm}.") for k in state)
    return headless and name.startswith("head.")


def _may_be_flat(table: Tensor, layout: str) -> bool:
    """Whether a table comes from a file that does not give its sides: 10 x 8 and 8 x 10 have as many entries.

    Conversion makes a table square wherever its entries allow it, even one of windows of 1 x 5.
    """
    return table.dim() == 2 or (table.shape[1] == table.shape[2] and layout not in (OURS.name, AS_IS))


def _fit_positions(state: dict[str, Tensor], key: str, module: PositionTable, layout: str, report: LoadReport) -> None:
    """Adapt a table of absolute positions to the grid of `module`; a file does not give its own, but all are square.

    Only a file that a model of the zoo wrote may be for a grid like `module`'s that is not square but has as many
    entries as a square one.
    """
    table = state.get(key)
    if table is None or table.dim() != 3 or not table.numel():
        return
    entries, side = table.shape[1], math.isqrt(table.shape[1])
    if side * side != entries and entries == module.table.shape[1]:
        report.in_order.append(key)
    if side * side != entries or tuple(module.grid) == (side, side):
        return
    if layout in (OURS.name, AS_IS) and entries == module.table.shape[1]:
        report.in_order.append(key)
        return
    state[key] = resize_positions(table, (side, side), module.grid)
    report.resized.append(key)


def fit_channels(state: dict[str, Tensor], model: nn.Module, what: str) -> int | None:
    """Convert the backbone's first convolution in `state` to the model's channels; its own channels, if they differ."""
    found = None
    for name, module in model.named_modules():
        key = f"{name}.{CONV}" if name else CONV
        shape = state[key].shape if isinstance(module, Backbone) and key in state else ()
        if len(shape) == 4 and shape[1] != module.in_chans:
            check_channels(state, key, module, what)
            state[key], found = adapt_input_conv(module.in_chans, state[key]), shape[1]
    return found


def check_channels(state: Mapping[str, Tensor], key: str, model: Backbone, what: str, channels: int = 3) -> None:
    """Raise CheckpointError where the first convolution is neither for the model's channels nor for `channels`.

    timm converts it only from the number of channels that it is told.
    """
    shape = state[key].shape if key in state else ()
    if len(shape) == 4 and shape[1] not in (channels, model.in_chans):
        raise CheckpointError(
            f"{what} is for images of {shape[1]} channels, which cannot be converted to {model.in_chans}"
        )


def classifier_of(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's parameters."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier", "head.fc" if isinstance(model, Backbone) else ())
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names or ()))


def _compare(
    state: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    missing: list[str],
    ignore: tuple[str, ...],
    model: nn.Module,
    layout: str,
) -> None:
    what = type(model).__name__
    left = [k for k in state if k not in want]
    other = [k for k in state if k in want and state[k].shape != want[k].shape]
    other = [k for k in other if k not in ignore or _kernel(state[k]) != _kernel(want[k])]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(want[k].shape)}" for k in other]
    # values of a quantised file mean nothing without its scales
    retyped = [k for k in state if k in want and want[k].dtype != state[k].dtype]
    floating = [k for k in retyped if want[k].is_floating_point()]
    integers = [_typed(k, state[k]) for k in floating if not state[k].is_floating_point()]
    bytewise = [_typed(k, state[k]) for k in retyped if state[k].is_floating_point() and state[k].itemsize == 1]
    parts = ((missing, "missing"), (left, "left over"), (shapes, "of another shape"))
    parts += ((integers, "of integers"), (bytewise, "of 8 bits"))
    if said := "; ".join(f"{len(names)} {how}: {listed(names)}" for names, how in parts if names):
        held = what_it_is(state)
        if layout != AS_IS:  # the names are ours by now, whichever the file has
            held = held.replace(f"in layout {OURS.name!r}", f"in layout {layout!r}")
        raise CheckpointError(f"the checkpoint does not fit this {what}. {held}{said}.{_flat_hint(state, want, model)}")
    if lost := [k for k, v in state.items() if not v.is_meta and not v.isfinite().all()]:
        raise CheckpointError(
            f"the checkpoint has NaN or infinity in {len(lost)} of {len(state)} tensors: {listed(lost)}. Its training "
            f"diverged, or the file is damaged: use an earlier one, or download it again."
        )
    narrow = [k for k in floating if torch.finfo(want[k].dtype).max < torch.finfo(state[k].dtype).max]
    if lost := [k for k in narrow if not state[k].is_meta and not state[k].to(want[k].dtype).isfinite().all()]:
        raise CheckpointError(
            f"the checkpoint has values too large for the types of this {what} in {len(lost)} of {len(state)} tensors: "
            f"{listed(_typed(k, want[k]) for k in lost)}. Build the model in float32 or bfloat16."
        )


def _kernel(weight: Tensor) -> torch.Size:
    """The shape of a convolution's weight without the channels of its input."""
    return weight.shape[:1] + weight.shape[2:]


def _flat_hint(state: Mapping[str, Tensor], want: Mapping[str, Tensor], model: nn.Module) -> str:
    """For messages: the image sizes whose windows flat tables may be of, which do not show the sides of these."""
    shapes = {name: tuple(state[name].shape) for name in want if name in state}
    flat = {name: shape[1] for name, shape in shapes.items() if name.endswith(".rpb") and len(shape) == 2}
    lengths = sorted({*flat.values()})
    # windows made for an image have two at most; more would make too many cases
    if not isinstance(model, Backbone) or not 1 <= len(lengths) <= 2 or not all(length % 2 for length in lengths):
        return ""
    found = set()
    for sides in product(*map(_sides, lengths)):
        of = dict(zip(lengths, sides, strict=True))
        tables = {name: (shapes[name][0], *of[length]) for name, length in flat.items()}
        found.add(model.args_from_shapes(shapes | tables).get("img_size"))
    sizes = [size for size in found if isinstance(size, tuple)]
    give = f"img_size={sizes[0]} or {sizes[0][::-1]}" if len(sizes) == 1 else "an img_size="
    windows = listed(f"{height // 2 + 1} x {width // 2 + 1}" for height, width in _sides(lengths[0]))
    which = f"of windows of {windows} tokens, in either order: give {give}, as the file was made with"
    return f" Tables of {lengths[0]} entries are {which}."


def _sides(entries: int) -> list[tuple[int, int]]:
    """The sides that a table of relative positions with so many entries, an odd number, may have, the shorter first."""
    return [(side, entries // side) for side in range(1, math.isqrt(entries) + 1, 2) if entries % side == 0]


def _typed(name: str, tensor: Tensor) -> str:
    return f"{name} {str(tensor.dtype).removeprefix('torch.')}"
