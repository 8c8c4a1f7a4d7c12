"""What an exported file says about its model, and how far what it computes is from the model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from timm.data import ImageNetInfo, resolve_input_data_config
from timm.models import FeatureInfo
from torch import Tensor, nn

from .backbone import Backbone
from .heads.features import OverBackbone, nhwc
from .share import LABELS, licence_of

ABOUT = "config.json"  # what an ONNX file's metadata and a program's extra files call it
OF_TRUNK = ("architecture", "mean", "std")  # what a head on a backbone has of its configuration
PACKAGES = ("attention-backbones", "torch", "timm")

Run = Callable[[Tensor], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from the one it came from, on one batch."""

    images: str
    absolute: float
    relative: float  # to the largest number, of the output that differs most
    agreeing: float | None  # share of images, or of pixels, with the same top class; None: the outputs are not logits


def about(model: nn.Module, image: Tensor) -> dict[str, Any]:
    """What is needed to use the model without this package, as far as it is known, under the names that timm has.

    architecture, input_size  (C, H, W), that of `image`
    mean, std                 of images between 0 and 1; for classifiers and features interpolation, crop_pct and
                              crop_mode as well
    num_classes, label_names  in the order of the logits; for ImageNet's synsets label_descriptions, name -> words
    license, notes            of the weights
    outputs                   name of each; of maps the channels, the reduction (pixels of the image per pixel of the
                              map, along a side) and the layout, NCHW or NHWC
    versions                  of the packages that wrote the file
    """
    cfg = _configuration(model)
    said = {"architecture": cfg.get("architecture"), **_preparation(model, cfg), "input_size": list(image.shape[1:])}
    said |= {"num_classes": _classes(model), **_labels(model, cfg)}
    said |= {"license": licence_of(model), "notes": cfg.get("notes")}
    said |= {"outputs": _outputs(model), "versions": _versions()}
    return {key: value for key, value in said.items() if value is not None}


def name_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Give the classes of a model names, in the order of its logits. Raises ValueError for another number of names."""
    classes = _classes(model)
    if len(names) != classes:
        raise ValueError(f"{len(names)} names are given, and the model has {classes or 'no'} classes: give one each")
    model.pretrained_cfg.pop("label_descriptions", None)
    model.pretrained_cfg.update(num_classes=classes, label_names=list(names))


def _configuration(model: nn.Module) -> Mapping[str, Any]:
    """timm's; a head on a backbone has its own, with little in it."""
    own = getattr(model, "pretrained_cfg", {})
    trunk = getattr(model.backbone, "pretrained_cfg", {}) if isinstance(model, OverBackbone) else {}
    return {key: trunk[key] for key in OF_TRUNK if key in trunk} | own


def _preparation(model: nn.Module, cfg: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(model, OverBackbone):  # takes images of any size: how they are resized is not the model's
        return {key: cfg[key] for key in ("mean", "std") if key in cfg}
    return resolve_input_data_config(getattr(model, "model", model), pretrained_cfg=cfg) if cfg else {}


def _classes(model: nn.Module) -> int | None:
    return getattr(model, "num_classes", None) or None


def _labels(model: nn.Module, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The names of the classes where they are given, or where the weights are those of a release for ImageNet-1k."""
    classes = _classes(model)
    if classes is None or classes != cfg.get("num_classes"):
        return {}
    if cfg.get("label_names"):
        return {key: cfg.get(key) for key in LABELS}
    if classes != 1000 or not cfg.get("tag") or not getattr(model, "of_release", True):
        return {}
    info = ImageNetInfo("imagenet-1k")
    return dict(zip(LABELS, (info.label_names(), info.label_descriptions(as_dict=True)), strict=True))


def _outputs(model: nn.Module) -> list[dict[str, Any]]:
    if isinstance(model, OverBackbone):
        maps = [(_classes(model), 1)]
    elif names(model) == ["features"]:
        return [{"name": "features", **_without_classifier(model)}]
    elif names(model) != ["logits"]:
        maps = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    else:
        return [{"name": "logits"}]
    layout = "NHWC" if nhwc(model) else "NCHW"
    return [
        {"name": name, "channels": channels, "reduction": reduction, "layout": layout}
        for name, (channels, reduction) in zip(names(model), maps, strict=True)
    ]


def _without_classifier(model: nn.Module) -> dict[str, Any]:
    """What a model gives that has no classifier: a vector, or if it does not pool either, for ours a map."""
    found = {"channels": model.num_features}
    if isinstance(model, Backbone) and not model.global_pool:
        found |= {"reduction": model.feature_info[len(model.stages) - 1]["reduction"], "layout": "NCHW"}
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # not installed, but read from a checkout
            found[name] = version(name)
    return found


def names(model: nn.Module) -> list[str]:
    """The names of the outputs: logits, or what a classifier would see, or the features of each stage."""
    info = getattr(model, "feature_info", None)
    if isinstance(info, FeatureInfo):
        return [f"features{index}" for index in info.out_indices]
    return ["features" if getattr(model, "num_classes", None) == 0 else "logits"]


def images(shape: Sequence[int]) -> dict[str, Tensor]:
    """Noise, and smooth images with frequencies as low as those of photographs; both (B, C, H, W) with deviation 1."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, generator=generator)
    coarse = torch.randn(*shape[:2], 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, tuple(shape[2:]), mode="bicubic")
    return {"random": noise, "smooth": smooth / smooth.std()}


@torch.no_grad()
def compare(model: nn.Module, run: Run, batches: dict[str, Tensor]) -> list[Difference]:
    """How the outputs of `run`, logits or maps, differ from those of `model`, batch by batch."""
    found = []
    for name, batch in batches.items():
        want, got = outputs(model(batch)), outputs(run(batch))
        absolute = [float((w - g).abs().max()) for w, g in zip(want, got, strict=True)]
        relative = [a / (float(w.abs().max()) or 1.0) for a, w in zip(absolute, want, strict=True)]
        agreeing = None
        if names(model) == ["logits"]:
            agreeing = float((want[0].argmax(1) == got[0].argmax(1)).float().mean())
        worst = max(range(len(want)), key=lambda i: relative[i] if relative[i] == relative[i] else torch.inf)
        found.append(Difference(name, absolute[worst], relative[worst], agreeing))
    return found


def outputs(given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)
