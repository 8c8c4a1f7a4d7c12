"""Which model and layout a state dict belongs to, told from its names and shapes alone."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .convert import Layout
from .described import TensorInfo
from .errors import listed
from .layouts import LAYOUTS
from .reader import Checkpoint, Description
from .registry import class_of, variants
from .releases import find
from .releases.table import WORDS

OURS = Layout("zoo", rules={part: part for part in ("stem", "stages", "head", "feature_norms")})
# what wrappers of models put before every name
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "backbone.", "encoder.")
COUNTERS = ("n_averaged", "steps", "total_ops", "total_params")  # of torch's and MMEngine's averages, and of thop
AS_IS = "as is"  # the layout of any other model than a backbone: its own state dict
CONV = "stem.conv1.weight"  # the first convolution in all families, (out, channels of the images, height, width)
TABLES = (".rpb", ".position.table")  # their shapes, except for the heads, depend on windows or images
BY_TIMM = ("model.safetensors", "pytorch_model.bin")  # what timm calls the weights beside a config.json
NAMED = {"window_size": "the windows"}  # names, for messages, of arguments that a file may not show
RANDOM = ("normal_", "uniform_", "trunc_normal_")

State = Mapping[str, Tensor | TensorInfo]
Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Recognition:
    """What a state dict is.

    candidates  (model, layout) of every variant that it fits; several where variants differ in what has no weights, or
                in windows that are not the file's
    exact       False: only the trunk fits, with other windows, or without a head or tables, as for dense prediction
    model       the variant: the only candidate, the one for the image size that tables show or the first of those that
                differ in it alone, or the one that the file's own name picks; else None
    by_name     whether the name had to pick
    classes     outputs of the classifier; None if there is none
    model_args  candidate -> its arguments beyond its name, as far as shapes show them: channels of the images, windows,
                sides of tables; the value is None for one that must be given, since the shapes do not show it
    """

    candidates: tuple[tuple[str, str], ...]
    exact: bool = True
    model: str | None = None
    by_name: bool = False
    classes: int | None = None
    model_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """What it is, in a sentence."""
        if not self.candidates:
            return "not a model of the zoo"
        settled = self.model is not None and not self.by_name
        models = [self.model] if settled else [model for model, _ in self.candidates]
        said = f"{' or '.join(models)} in layout {self.candidates[0][1]!r}"
        said += "" if self.exact else " (with other windows, without tables or with another head)"
        if not settled:
            said += ", which differ only in what has no weights"
            said += f": {self.model} by its name" if self.by_name else ": name the model"
        missing = self.missing_args(self.candidates[0][0])
        return said + "".join(f"; {NAMED[key]} are not in it: give {key}=" for key in missing)

    def arguments(self, model: str) -> dict[str, Any]:
        """Arguments beyond name and classes that build `model` as the file's was; none if the file does not fit it."""
        return {key: value for key, value in self.model_args.get(model, {}).items() if value is not None}

    def missing_args(self, model: str) -> list[str]:
        """Arguments that `model` must be built with to be the file's, and that the file does not show."""
        return [key for key, value in self.model_args.get(model, {}).items() if value is None]

    def in_python(self, model: str, function: str = "timm.create_model", **arguments: Any) -> str:
        """For commands that do not take such arguments: the call of `function` that builds `model`, with `arguments`
        added; empty if the file shows all of them.
        """
        if not (missing := self.missing_args(model)):
            return ""
        given = [f"{key}={value!r}" for key, value in (arguments | self.arguments(model)).items()]
        return f"{function}({', '.join([repr(model), *given, *(f'{key}=...' for key in missing)])})"


def recognise(state: State, name: str = "") -> Recognition:
    """What a bare state dict is; a file's `name` only decides between models that fit equally."""
    state = without_prefix(state)
    fitting, exact = _candidates(state)
    if not fitting:
        return Recognition((), exact=False)
    candidates = tuple((model, layout) for model, layout, _ in fitting)
    conv, weight = (_entry(state, *candidates[0], name) for name in (CONV, "head.fc.weight"))
    channels = {"in_chans": conv[1]} if len(conv) == 4 and conv[1] not in (0, 3) else {}
    classes = weight[0] if weight else None
    model_args = {model: channels | _args(model, shapes) for model, _, shapes in fitting}
    models = _distinct(model_args)
    model = models[0] if len(models) == 1 else _named(name, models)
    by_name = model is not None and len(models) > 1
    return Recognition(candidates, exact, model, by_name, classes, model_args)


def hint(file: Checkpoint | Description) -> str:
    """The name that may decide between models that fit equally: from the file's metadata, from timm's config.json
    beside it, or the file's own.
    """
    path = Path(file.path)
    said = file.meta.get("model") or (architecture(path.parent) if path.name in BY_TIMM else None)
    # whatever stands there is taken for the name of a file
    return Path(said).name[-255:] if isinstance(said, str) else file.path


def architecture(folder: Path) -> str | None:
    """The model that timm's config.json names, in a folder as `zoo.save_for_hf` writes it; None without one."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or another program's
        return None
    name = said.get("architecture") if isinstance(said, dict) else None
    return name if isinstance(name, str) else None


def identify(state: State) -> list[tuple[str, str]]:
    """(model, layout) of every variant that a bare state dict fits, except for the classifier.

    If none fits exactly, those whose trunk it fits: with other windows, or without a head or tables, as for dense
    prediction.
    """
    return list(recognise(state).candidates)


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes that wrappers of models put before every name, however many, and without
    what torch.compile puts into the names of compiled parts.
    """
    state = {
        key.replace("._orig_mod.", "."): value for key, value in state.items() if key.rpartition(".")[2] not in COUNTERS
    }
    outer = (min(state), max(state)) if state else ("",)  # a prefix of both is one of all others
    length = 0
    while prefix := next((p for p in PREFIXES if all(key.startswith(p, length) for key in outer)), None):
        length += len(prefix)
    return {key[length:]: value for key, value in state.items()}


def parts(state: Mapping[str, Tensor]) -> Counter[str]:
    """The first words of the names, backbone, decode_head and the like, and how many entries each has."""
    return Counter(key.partition(".")[0] for key in state)


def recognised_part(state: State, name: str = "") -> tuple[str, Recognition] | None:
    """The part of a state dict that is a model of the zoo, such as a detector's backbone; None if there is none.

    name  of the file, see `recognise`
    """
    for part in parts(state):
        found = recognise({k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}, name)
        if found.candidates:
            return part, found
    return None


def sole_part(state: State) -> str | None:
    """The part that is all of a state dict, if it is a model of the zoo: "net" where every name begins with "net."."""
    names = parts(state)
    return next(iter(names)) if len(names) == 1 and recognised_part(state) else None


def part_hint(state: State, path: str | Path) -> str:
    """For commands that read whole files: how to extract the part that is a model of the zoo; empty if none is."""
    if not (inner := recognised_part(without_prefix(state), str(path))):
        return ""
    part, found = inner
    command = f"python -m zoo.convert {path} OUT --part {part}"
    return f". Its part {part!r} is {found.message}. The command {command} extracts it"


def layouts_of(cls: type[nn.Module]) -> tuple[Layout, ...]:
    """The layouts that weights of `cls` come in, ours last: its rules cover names of other families too."""
    return (*LAYOUTS.get(cls.__name__, ()), OURS)


def closest(state: State) -> tuple[str, str, Shapes] | None:
    """(model, layout, shapes under our names) of the variant that differs least; None if no layout fits the names.

    Keys that not even the closest layout has a rule for keep their own name.
    """
    state = without_prefix(state)
    strange = _strange(state)
    others = {key: torch.Size(state[key].shape) for key in strange if key in state}
    found = [
        (_differences(shapes, _shapes_of(name)), name, layout, shapes | others)
        for names, layout, shapes in _under_our_names({k: v for k, v in state.items() if k not in strange})
        for name in names
    ]
    return min(found, key=lambda case: case[:3])[1:] if found else None


def compare(shapes: Shapes, model: str) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, left over, and of another shape, compared with those of a variant."""
    want = _shapes_of(model)
    other = [key for key in shapes if key in want and shapes[key] != want[key]]
    return [key for key in want if key not in shapes], [key for key in shapes if key not in want], other


def is_table(name: str, shape: torch.Size) -> bool:
    """Whether a tensor is a table of positions, flat or with sides, whatever the windows or images are."""
    return name.endswith(TABLES) and len(shape) in (2, 3) and 0 not in shape


def _candidates(state: State) -> tuple[list[tuple[str, str, Shapes]], bool]:
    """(model, layout, shapes under our names) of every variant that fits, and whether exactly."""
    found = []
    for names, layout, shapes in _under_our_names(state):
        # building a variant takes a while, counting blocks and channels does not
        counts = _depths(shapes), _widths(shapes)
        found += [(name, layout, shapes) for name in names if _may_be(name, *counts)]
    exact = [case for case in found if case[2] == _shapes_of(case[0])]
    trunks = [case for case in found if _trunk(case[2]) in _trunks(case[0])]
    return exact or _of_their_windows(trunks), bool(exact)


def _of_their_windows(found: list[tuple[str, str, Shapes]]) -> list[tuple[str, str, Shapes]]:
    """Of cases, as `_candidates` returns them, those of classes that tables show windows of, if there are any: others
    cannot have tables of these sides.
    """
    return [case for case in found if class_of(case[0]).args_from_shapes(case[2])] or found


def _cases() -> list[tuple[list[str], Layout]]:
    """Every layout with the models that it is for."""
    classes: dict[type[nn.Module], list[str]] = {}
    for name in variants():
        classes.setdefault(class_of(name), []).append(name)
    released = ((names, layout) for cls, names in classes.items() for layout in layouts_of(cls)[:-1])
    return [
        *(([name for name in names if name.startswith(layout.models)], layout) for names, layout in released),
        (list(variants()), OURS),
    ]


def _strange(state: State) -> list[str]:
    """The keys that the closest layout has no rule for; none if these are half of the keys or more."""
    fewest = min((layout.unknown(state) for _, layout in _cases()), key=len)
    return fewest if 2 * len(fewest) < len(state) else []


def _under_our_names(state: State) -> list[tuple[list[str], str, Shapes]]:
    """Models, layout and shapes under our names, for each layout that has a rule for every key."""
    state, found = {key: _meta(value) for key, value in state.items()}, []
    for names, layout in _cases():
        if state and not layout.unknown(state):
            try:
                found.append((names, layout.name, _shapes(layout.to_ours(state))))
            except ValueError:  # the names are of this layout, the shapes are not
                continue
    return found


def _entry(state: State, model: str, layout: str, name: str) -> tuple[int, ...]:
    """The shape of the tensor that we call `name`; empty if there is none."""
    known = next(known for known in layouts_of(class_of(model)) if known.name == layout)
    tensor = state.get(known.theirs(name) or "")
    return () if tensor is None else tuple(tensor.shape)


def _args(model: str, shapes: Shapes) -> dict[str, Any]:
    """What shapes show of how a variant was built, without windows that it has by itself."""
    defaults = {key: parameter.default for key, parameter in signature(class_of(model)).parameters.items()}
    own, shown = defaults | variants()[model], class_of(model).args_from_shapes(shapes)
    # commands that build models for the images of their data ask for the file's size, whichever it is
    return {key: value for key, value in shown.items() if key == "img_size" or value is None or value != own[key]}


def _meta(value: Tensor | TensorInfo) -> Tensor:
    return value.meta() if isinstance(value, TensorInfo) else torch.empty_like(value, device="meta")


def _named(file: str, models: Sequence[str]) -> str | None:
    """The one of `models` that a file's name points to; None if it points to none, or to several equally."""
    released = [model for model in models if find(model, filename=file)]
    if len(released) == 1:
        return released[0]
    # SHI-Labs write dinat_s_tiny and dinats_tiny
    words = set(re.split(r"[^a-z0-9]+", Path(file).name.lower().replace("dinat_s_", "dinats_")))
    points = {}
    for model in models:
        family, *rest = model.split("_")
        said = [word in words or WORDS.get(word, word) in words for word in rest]
        if family in words:
            points[model] = (sum(said), -said.count(False))
    best = [model for model in points if points[model] == max(points.values())]
    return best[0] if len(best) == 1 else None


def _distinct(shown: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The models, or only one of them if they are the same once built with the arguments that shapes show: the one that
    has these itself, else the first.

    shown  model -> these arguments
    """
    models, own = list(shown), {model: variants()[model] for model in shown}
    built = {model: (class_of(model), own[model] | args) for model, args in shown.items()}
    if not all(shown.values()) or any(one != built[models[0]] for one in built.values()):
        return models
    return [next((model for model in models if own[model] | shown[model] == own[model]), models[0])]


def _depths(shapes: Shapes) -> dict[str, int]:
    """Blocks of each stage, from our names of the tensors."""
    blocks = {match[0] for key in shapes if (match := re.match(r"stages\.\d+\.blocks\.\d+", key))}
    return dict(Counter(block.split(".")[1] for block in blocks))


def _widths(shapes: Shapes) -> set[tuple[str, int]]:
    """Stages with the lengths of their vectors, one of which is the stage's number of channels."""
    return {(key.split(".")[1], shape[0]) for key, shape in shapes.items() if key[:7] == "stages." and len(shape) == 1}


def _may_be(name: str, depths: dict[str, int], widths: set[tuple[str, int]]) -> bool:
    """Whether a variant has as many blocks in each stage, and as many channels, as far as its table says."""
    table = variants()[name]
    dims = enumerate(table.get("dims", ()))
    return depths == {str(i): n for i, n in enumerate(table["depths"])} and all((str(i), d) in widths for i, d in dims)


def _trunk(shapes: Shapes) -> Shapes:
    """The shapes of a backbone's own weights; those of tables with -1 for what depends on windows or images."""
    return {
        key: torch.Size((shape[0], -1)) if is_table(key, shape) else shape
        for key, shape in shapes.items()
        if not key.startswith(("head.", "feature_norms."))
    }


def _trunks(name: str) -> list[Shapes]:
    """The trunk of a variant and, if its class can be built so, the same without tables of relative positions."""
    trunk = _trunk(_shapes_of(name))
    bare = {key: shape for key, shape in trunk.items() if not key.endswith(".rpb")}
    return [trunk, bare] if "rel_pos_bias" in signature(class_of(name)).parameters else [trunk]


def _differences(shapes: Shapes, want: Shapes) -> int:
    return len(shapes.items() ^ want.items())


class _Unfilled(TorchFunctionMode):
    """Modules that are built in this context do not initialise their parameters, which takes most of the time."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in RANDOM:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@cache
def _shapes_of(name: str) -> Shapes:
    with torch.device("meta"), _Unfilled():
        return _shapes(class_of(name)(**variants()[name]).state_dict())


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    """Without the classifier's, and without the number of channels of the images."""
    shapes = {
        k: v.shape for k, v in state.items() if not k.startswith("head.fc.") and not k.endswith("num_batches_tracked")
    }
    return {k: shape[:1] + shape[2:] if k == CONV else shape for k, shape in shapes.items()}


def what_it_is(state: Mapping[str, Tensor]) -> str:
    """For messages: what a state dict is instead of what was expected, and what to do; "" if unknown."""
    found = recognise(state)
    if found.candidates:
        # a file cannot tell apart variants that differ in what has no weights, such as dilations
        names = found.model or " or ".join(name for name, _ in found.candidates)
        return f"It holds {names} in layout {found.candidates[0][1]!r}. "
    if inner := recognised_part(state):
        part, within = inner
        others = sorted(parts(state).keys() - {part})
        without = f" without {listed(others)}" if others else ""
        command = f"For use in a command, python -m zoo.convert IN OUT --part {part} extracts it. "
        return f"Its part {part!r} is {within.message}; part={part!r} reads it{without}. {command}"
    return ""
