"""From tables to timm: every variant becomes a timm model, its releases become pretrained tags."""

import math
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    FeatureDictNet,
    FeatureHookNet,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet

from .backbone import Backbone
from .blocks import check_stages, plain
from .releases import Release, candidates

_CLASSES: dict[str, type[Backbone]] = {}
_VARIANTS: dict[str, dict[str, Any]] = {}


class FeatureGetter(FeatureGetterNet):
    """timm's, with the gradient checkpointing of the model in it."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


class FeatureHooks(FeatureHookNet):
    """timm's, with the gradient checkpointing of the model in it: timm's own is of the layers between two others."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self["body"].set_grad_checkpointing(enable)


def register(cls: type[Backbone], variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Make timm models from a family's table: name -> keyword arguments of `cls`, plain data.

    They include `img_size` and `depths`, the blocks of each stage.
    """
    module = sys.modules[cls.__module__]
    # timm reads the configurations of a model from its module, under this name, when the model is registered
    cfgs = module.__dict__.setdefault("default_cfgs", {})
    cfgs.update(generate_default_cfgs(_cfgs(cls, variants)))
    for name, args in variants.items():
        _CLASSES[name], _VARIANTS[name] = cls, dict(args)
        create = register_model(_entrypoint(cls, name))
        setattr(module, name, create)  # timm lists it in the module's __all__


def variants() -> dict[str, dict[str, Any]]:
    """All models of the zoo: name -> keyword arguments of its constructor, as plain data."""
    return {name: dict(args) for name, args in _VARIANTS.items()}


def class_of(name: str) -> type[Backbone]:
    """The class that builds the variant `name`."""
    return _CLASSES[name]


def _cfgs(cls: type[Backbone], variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """timm's pretrained configurations: one per release, or one without weights, since timm needs one."""
    cfgs = {}
    for name, args in variants.items():
        releases = [r for r in candidates(name) if r.loadable]
        cfgs |= {f"{name}.{r.tag}": _cfg(cls, args, r) for r in releases} or {name: _cfg(cls, args, None)}
    return cfgs


def _cfg(cls: type[Backbone], args: Mapping[str, Any], release: Release | None) -> dict[str, Any]:
    cfg = {
        "input_size": (3, args["img_size"], args["img_size"]),
        "num_classes": 1000,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": None,
    }
    cfg |= release.cfg() if release else {}
    return cfg | {"pool_size": tuple(math.ceil(side / cls.reduction) for side in cfg["input_size"][1:])}


def _entrypoint(cls: type[Backbone], name: str):
    def create(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        return build(cls, name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = cls.__module__
    create.__doc__ = f"{cls.__name__} {_VARIANTS[name]}"
    return create


def build(cls: type[Backbone], name: str, pretrained: bool, **kwargs: Any) -> torch.nn.Module:
    """What `timm.create_model(name, ...)` calls: the variant with `kwargs` over its own arguments.

    pretrained  load the weights of the tag in `pretrained_cfg`, or those that `pretrained_cfg_overlay` names: file=,
                url=, hf_hub_id= or state_dict=. Whatever their layout, it is recognised and converted
    pretrained_strict  False: weights that lack some of the model's names are loaded, with a warning; those stay new
    device, dtype  of the parameters; the weights of a checkpoint are loaded at this precision
    img_size    default: that of the images of the tag in `pretrained_cfg`, which may be a tag, or a configuration with
                one; without a tag the variant's own
    Raises CheckpointError if the weights cannot be read or do not fit this model, and ValueError for an invalid size or
    number of channels or classes, for weights on the meta device, or for an unsupported `feature_cls` ('getter', 'hook'
    and 'fx' work; with `feature_norms` only 'getter').
    """
    from .checkpoint import adapt, overlay_with_weights

    kind = kwargs.get("feature_cls", "getter")
    if kwargs.get("features_only"):
        _check_features(kind, bool(kwargs.get("feature_norms")))
        kwargs["feature_cls"] = _checkpointing(kind)
    strict = kwargs.get("pretrained_strict", True)
    fitted = partial(adapt, classifies=not kwargs.get("features_only"), strict=strict)
    displaced: dict[str, Any] = {}
    # without a tag timm takes the first release's configuration, licence included, whether or not it is loaded
    released = bool(kwargs.get("pretrained_cfg")) or (pretrained and not kwargs.get("pretrained_cfg_overlay"))
    if pretrained:
        if _device(kwargs.get("device")).type == "meta":
            raise ValueError("pretrained=True on the meta device, without memory for weights: build it on another one")
        kwargs["pretrained_cfg_overlay"], displaced, layout = overlay_with_weights(cls, name, kwargs)
        fitted = partial(fitted, layout=layout)
    args = {**_VARIANTS[name], **_size(name, kwargs.get("pretrained_cfg")), **kwargs}
    check_stages(depths=args["depths"])
    seen = {} if _is_getter(kind) else {"output_fmt": "NHWC"}  # by hooks and graphs; the getter asks for NCHW
    model = build_model_with_cfg(
        _constructor(cls),
        name,
        pretrained,
        pretrained_filter_fn=fitted,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), **seen},
        **args,
    )
    _forget_weights(model, displaced)
    model.of_release = released
    return model


def _size(name: str, given: Any) -> dict[str, Any]:
    """`img_size` of the images of a tag, which is `given` as `pretrained_cfg` or is in it; empty without a tag of this
    model's, as in the configuration of a hub.
    """
    if isinstance(given, str) and given:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg=given)
    else:
        tag = given.get("tag") if isinstance(given, Mapping) else getattr(given, "tag", None)
        cfg = get_arch_pretrained_cfgs(name).get(f"{name}.{tag}")
    return {"img_size": plain(cfg.input_size[1:])} if cfg else {}


def _forget_weights(model: torch.nn.Module, displaced: Mapping[str, Any]) -> None:
    """Remove the weights from the configuration: timm keeps it, and every copy of the model would hold them twice."""
    for part in model.modules():  # a model of features contains one
        cfg = getattr(part, "pretrained_cfg", None)
        if cfg is not None and cfg.pop("state_dict", None) is not None:
            cfg.update(displaced)


def _check_features(kind: Any, normed: bool) -> None:
    """Raise ValueError for timm's wrappers that take a model apart: they look for features only among its children.

    normed  whether each feature has a norm of its own, which only the getter's come from
    """
    if isinstance(kind, str):
        known = kind.lower() in ("getter", "fx") or "hook" in kind.lower()
    else:
        known = not (isinstance(kind, type) and issubclass(kind, FeatureDictNet))
    if not known:
        raise ValueError(f"feature_cls is {kind!r}: expected 'getter' (the default), 'hook' or 'fx'")
    if normed and not _is_getter(kind):
        raise ValueError(
            f"feature_cls is {kind!r}, which sees features before their norms (feature_norms=True): expected 'getter'"
        )


def _is_getter(kind: Any) -> bool:
    return getattr(kind, "__name__", str(kind)).lower() in ("getter", "featuregetternet")


def _checkpointing(kind: Any) -> Any:
    """`feature_cls` for timm: of its getter and its hooks, ours."""
    if _is_getter(kind):
        return FeatureGetter
    hooks = kind is FeatureHookNet or (isinstance(kind, str) and "hook" in kind.lower())
    return FeatureHooks if hooks else kind


def _constructor(cls: type[Backbone]):
    def construct(*, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Backbone:
        with _device(device):
            model = cls(**kwargs)
        return model if dtype is None else model.to(dtype)

    return construct


def _device(given: Any) -> torch.device:
    """The device that is given, possibly as a number, 0 among them, else torch's default."""
    return torch.get_default_device() if given is None else torch.device(given)
