"""Recognises whole segmenters and detectors from names and shapes: mmsegmentation's, mmdetection's, or the zoo's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import releases
from ..described import TensorInfo
from ..recognise import Recognition, recognise, without_prefix
from ..registry import variants
from ..releases import Release
from .segmenter import AUXILIARY_CHANNELS

CONV = "conv.weight"
# head -> a tensor that only it has, the tensor whose rows are the channels
SEGMENTERS = {
    "upernet": ("decode_head.psp_modules.0.1." + CONV, "decode_head.bottleneck." + CONV),
    "semantic_fpn": ("decode_head.scale_heads.0.0." + CONV, "neck.lateral_convs.0." + CONV),
    "fcn": ("decode_head.convs.0." + CONV, "decode_head.convs.0." + CONV),
}
# head -> a tensor that those before it lack, rows per class, rows besides those of classes
DETECTORS = {
    "cascade_mask_rcnn": ("roi_head.mask_head.0.conv_logits.bias", 1, 0),
    "mask_rcnn": ("roi_head.mask_head.conv_logits.bias", 1, 0),
    "faster_rcnn": ("roi_head.bbox_head.fc_cls.bias", 1, 1),
    "retinanet": ("bbox_head.retina_cls.bias", 9, 0),
}
TASKS = {"segment": "segmentation", "detect": "detection"}
KINDS = {"segment": "segmenter", "detect": "detector"}
# task -> tensors of the zoo's own heads, one of which every model for it has
OWN = {
    "segment": ("decode_head.classifier.weight",),
    "detect": ("heads.rpn.head.cls_logits.weight", "heads.head.classification_head.cls_logits.weight"),
}


@dataclass(frozen=True)
class DenseRecognition:
    """What a file of a whole model for dense prediction is.

    task      "segment" or "detect": `zoo.heads.segmenter` builds it, or `zoo.heads.detector`
    head      its name in that function
    classes   without the background
    options   further arguments of that function: channels, and for a segmenter whether it has its auxiliary head
    backbone  what its backbone is
    """

    task: str
    head: str
    classes: int
    backbone: Recognition
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """What it is, in a few words; `backbone.message` says more of the backbone."""
        found = self.backbone
        models = [found.model] if found.model else [model for model, _ in found.candidates]
        trunk = " or ".join(models) or "a backbone that is not of the zoo"
        return f"{self.head} on {trunk}, {self.classes} class{'es' * (self.classes != 1)}"

    def arguments(self, model: str) -> dict[str, Any]:
        """What a backbone is built with beyond its name: windows and channels, as the file shows them, and DiNAT's
        dilations, which no file shows, as its authors use them for this task. `backbone.missing_args` lists what the
        file should show but does not.
        """
        dilates = isinstance(variants().get(model, {}).get("dilations"), str)
        return self.backbone.arguments(model) | ({"dilations": TASKS[self.task]} if dilates else {})

    def release(self, path: Path, model: str) -> Release | None:
        """The release that the file is, by its name."""
        named = releases.find(model, filename=path.name)
        return named if named and named.task == TASKS[self.task] else None

    def built_with(self, model: str, release: Release | None) -> dict[str, Any]:
        """The arguments that the backbone is built with: those of `arguments`, and its release's."""
        return self.arguments(model) | dict(release.arguments if release else {})


def recognise_dense(state: Mapping[str, Tensor | TensorInfo], name: str = "") -> DenseRecognition | None:
    """What a state dict in mmseg's or mmdet's names is; None if it is neither. A file's `name` as in `recognise`."""
    state = without_prefix(state)
    sized = {key: value for key, value in state.items() if value.shape}  # a single number has no channels
    found = _segmenter(sized) or _detector(sized)
    if found is None:
        return None
    trunk = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return DenseRecognition(*found[:3], recognise(trunk, name), found[3])


def task_of_own(state: Mapping[str, Tensor | TensorInfo]) -> str | None:
    """The task of a state dict of a whole segmenter or detector in the zoo's names; None for any other."""
    names = without_prefix(state).keys()
    return next((task for task, marks in OWN.items() if names & set(marks)), None)


def _segmenter(state: Mapping[str, Any]) -> tuple[str, str, int, dict[str, Any]] | None:
    for head, (mark, wide) in SEGMENTERS.items():
        if {mark, wide, "decode_head.conv_seg.bias"} <= state.keys():
            options = {"channels": state[wide].shape[0]}
            if head != "semantic_fpn":
                options["auxiliary"] = _auxiliary(state)
            return "segment", head, state["decode_head.conv_seg.bias"].shape[0], options
    return None


def _auxiliary(state: Mapping[str, Any]) -> bool:
    """Whether it has the auxiliary head that `zoo.heads.segmenter` builds; any other is left out."""
    head = "auxiliary_head."
    convs = {name: x.shape[0] for name, x in state.items() if name.startswith(head) and name.endswith(CONV)}
    return convs == {f"{head}convs.0.{CONV}": AUXILIARY_CHANNELS}


def _detector(state: Mapping[str, Any]) -> tuple[str, str, int, dict[str, Any]] | None:
    wide = "neck.lateral_convs.0." + CONV
    for head, (mark, each, beside) in DETECTORS.items():
        if {mark, wide} <= state.keys():
            return "detect", head, (state[mark].shape[0] - beside) // each, {"channels": state[wide].shape[0]}
    return None
