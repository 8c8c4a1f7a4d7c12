"""The maps that heads read: of the zoo's models, or of any timm model with `features_only`."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet
from torch import Tensor, nn

from ..backbone import Backbone
from ..convert import Layout
from ..layouts import LAYOUTS
from ..layouts.segmenters import layouts_over
from ..recognise import layouts_of
from ..registry import class_of, variants

WRAPPED = ("model", "body")  # what timm's wrappers for features call the whole model
REBUILT = (FeatureDictNet, FeatureHookNet, FeatureGraphNet)  # wrappers that may keep parts of the model, not the whole
FEWEST = 3  # maps with which heads that read more make do, if a backbone has no more: LeViT, NesT, PiT, Visformer


class OverBackbone(nn.Module):
    """A model with a `backbone` of `backbone_of` and the methods that trainers call on a timm model.

    `zoo.load_checkpoint` calls the first four methods.
    """

    backbone: nn.Module

    def layouts(self) -> tuple[Layout, ...]:
        """How files name the whole model."""
        raise NotImplementedError(f"{type(self).__name__} has no layouts: it must name those of its files")

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Adapt a file's state dict, under the model's own names, in place, to what this model was built with."""

    def unused(self, part: str) -> bool:
        """Whether to leave out a part of a file, since the model was built without it."""
        return False

    def advice(self, state: Mapping[str, Tensor]) -> str:
        """What helps with a file that does not fit, its tensors as it names them; empty if that is not known."""
        return ""

    def layouts_around(self, heads: Layout, own_heads: Layout) -> tuple[Layout, ...]:
        """The layouts of the whole model, from those of its heads, see `layouts_over`."""
        model = getattr(self.backbone, "model", None)
        if isinstance(model, Backbone):
            return layouts_over(heads, own_heads, layouts_of(type(model)), "backbone.model.", unread(model))
        return layouts_over(heads, own_heads, (), "backbone.")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for _, method in self._inner("set_grad_checkpointing"):
            return method(enable)
        raise ValueError(f"{type(self.backbone).__name__} has no gradient checkpointing: build it without feature_cls")

    def no_weight_decay(self) -> set[str]:
        """The backbone's own; of one that timm took apart, as Swin, only if it was created here, from its name."""
        return {f"{prefix}{name}" for prefix, model in self._inner("no_weight_decay") for name in model()}

    def lr_scales(self) -> dict[str, float]:
        """Factors on the learning rate, by name, as the backbone's own `lr_scales`."""
        return {
            f"{prefix}{name}": scale for prefix, model in self._inner("lr_scales") for name, scale in model().items()
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay: the backbone's own, then neck and heads at the full rate.

        If a timm model defines none for its features, each child of the backbone is a layer.
        """
        for prefix, matcher in self._inner("group_matcher"):
            return {name: _behind(prefix, patterns) for name, patterns in matcher(coarse).items()}
        return {name: rf"{re.escape(f'backbone.{name}')}\." for name, _ in self.backbone.named_children()}

    def _inner(self, method: str) -> list[tuple[str, Any]]:
        """A method of the model that timm wrapped, or else of the backbone itself, with the prefix of its names."""
        inner = [(f"backbone.{name}.", child) for name, child in self.backbone.named_children() if name in WRAPPED]
        candidates = [*inner, ("backbone.", self.backbone)]
        return [(prefix, getattr(model, method)) for prefix, model in candidates if hasattr(model, method)][:1]


def _behind(prefix: str, patterns: Any) -> Any:
    """timm's patterns of names, which it matches from the first letter on, for names with a prefix."""
    if isinstance(patterns, str):
        patterns = re.sub(r"(?<!\[)\^", "", patterns)  # an anchor would match before the prefix; [^...] is not one
        return f"{re.escape(prefix)}(?:{patterns})"
    return [(_behind(prefix, pattern), order) for pattern, order in patterns] if patterns else patterns


def backbone_of(backbone: str | nn.Module, levels: int, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A model that returns maps of an image, fine to coarse: the heads read the last `levels`, or all if it has three.

    backbone  a name for timm.create_model(features_only=True, **kwargs), which then returns the `levels` coarsest maps,
              or all if it has fewer, for the zoo's models with a norm on each if the family's published dense models
              have them; or such a model
    Raises ValueError for a module that returns no or too few features, or that comes with further arguments, and for
    `out_indices` that name maps in another order, or twice (timm returns each once, fine to coarse), or that it lacks.
    """
    if isinstance(backbone, str):
        name = backbone
        if normed(name):
            kwargs.setdefault("feature_norms", True)
        backbone = _created(name, levels, pretrained=pretrained, **kwargs)
        if isinstance(backbone, REBUILT) and not any(child in WRAPPED for child, _ in backbone.named_children()):
            _restore_methods(backbone, name, **kwargs)
    elif pretrained or kwargs:
        given = ", ".join([*(["pretrained"] if pretrained else []), *kwargs])
        raise ValueError(f"the backbone is a module, so {given} cannot be given: build it with them")
    found = getattr(backbone, "feature_info", None)
    if not hasattr(found, "channels"):
        raise ValueError(f"{type(backbone).__name__} returns no features: create it with timm's features_only=True")
    named = list(getattr(found, "out_indices", []))
    if len(set(named)) < len(named):
        raise ValueError(f"out_indices are {named}: name each map once")
    if len(found.channels()) < min(levels, FEWEST):
        least = f", {FEWEST} at least" if levels > FEWEST else ""
        returns = f"{type(backbone).__name__} returns {len(found.channels())}"
        raise ValueError(f"the head reads {levels} levels{least}; {returns}: give more out_indices or another head")
    if found.reduction() != sorted(found.reduction()):
        raise ValueError(f"the features are at strides {found.reduction()}: give out_indices from fine to coarse")
    return backbone


def _created(name: str, levels: int, **kwargs: Any) -> nn.Module:
    """The model with the last `levels` maps of `out_indices`, by default its coarsest, or all if it has fewer."""
    given = kwargs.pop("out_indices", None)
    indices = levels if given is None else given
    if isinstance(indices, int):  # so many of the last
        indices = tuple(range(-indices, 0))
    try:
        # a map that is not read would have a norm without a gradient, which DDP refuses
        return timm.create_model(name, features_only=True, out_indices=indices[-levels:], **kwargs)
    except (AssertionError, IndexError) as error:  # which timm raises for maps that a model lacks, and for other causes
        with torch.device("meta"):
            one = timm.create_model(name, features_only=True, out_indices=(-1,), **{**kwargs, "pretrained": False})
        count = len(one.feature_info)
        if all(-count <= i < count for i in indices):
            raise
        if given is not None:
            said = f"out_indices are {list(indices)}; {name} has {count} maps: expected 0 to {count - 1}"
            raise ValueError(said) from error
        return timm.create_model(name, features_only=True, out_indices=tuple(range(count)), **kwargs)


def _restore_methods(backbone: nn.Module, name: str, **kwargs: Any) -> None:
    """Give a model that timm took apart what the whole one says of its parameters, under the names they have now."""
    kwargs = {key: value for key, value in kwargs.items() if key not in ("out_indices", "feature_cls", "device")}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # what trains afterwards draws as if without it
        whole = timm.create_model(name, **{**kwargs, "checkpoint_path": None})
    own = dict(backbone.named_parameters()).keys()
    undecayed = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else set()
    scales = whole.lr_scales() if hasattr(whole, "lr_scales") else {}
    # partial: a model with a lambda could not be pickled
    backbone.no_weight_decay = partial(set, own & {key for name in undecayed for key in _rebuilt_names(name)})
    named = {key: scale for name, scale in scales.items() for key in _rebuilt_names(name) if key in own}
    backbone.lr_scales = partial(dict, named)


def _rebuilt_names(name: str) -> tuple[str, ...]:
    """What a parameter is called in timm's wrappers that rebuild a model: some flatten its outermost sequences."""
    return name, name.replace(".", "_", 1), f"graph_module.{name}"


def divisor_of(backbone: nn.Module) -> int:
    """What the sides of images are padded to multiples of: the largest stride of timm's models, some of which take no
    others; 1 for the zoo's, which take any size, and for those that only take the size that they are built for.
    """
    if isinstance(getattr(backbone, "model", None), Backbone):
        return 1
    strict = [module.strict_img_size for module in backbone.modules() if hasattr(module, "strict_img_size")]
    fixed = any(strict) if strict else (getattr(backbone, "pretrained_cfg", None) or {}).get("fixed_input_size", False)
    return 1 if fixed else backbone.feature_info.reduction()[-1]


def normed(name: str) -> bool:
    """Whether the published dense models of this variant's family put a norm on every level."""
    model = name.partition(".")[0]
    layouts = LAYOUTS.get(class_of(model).__name__, ()) if model in variants() else ()
    return any("feature_norms.{i}" in layout.rules.values() for layout in layouts)


def unread(model: Backbone) -> set[int]:
    """The levels of a backbone with a norm on each that is read which have none. A model without any reads none of a
    file's: that is an error where it is loaded, as its maps are not those of the file.
    """
    missing = {i for i, norm in enumerate(model.feature_norms) if isinstance(norm, nn.Identity)}
    return missing if len(missing) < len(model.feature_norms) else set()


def maps(backbone: nn.Module, images: Tensor, levels: int) -> list[Tensor]:  # (B, 3, H, W) -> [(B, C, h, w)]
    """The last `levels` maps; some timm models return (B, h, w, C), and say so."""
    features = list(backbone(images))[-levels:]
    return [x.permute(0, 3, 1, 2) for x in features] if nhwc(backbone) else features


def nhwc(backbone: nn.Module) -> bool:
    return getattr(getattr(backbone, "output_fmt", None), "value", "NCHW") == "NHWC"
