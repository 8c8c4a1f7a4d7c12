"""Semantic segmentation: a backbone, a head that labels every pixel, and an auxiliary one for training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.dispatch import wide
from ops.sizes import covering

from ..blocks import check_count, number
from ..convert import Layout
from ..errors import CheckpointError
from ..layouts.segmenters import HEADS as MMSEG
from ..layouts.segmenters import OUR_HEADS
from .fcn import FCN
from .features import OverBackbone, backbone_of, divisor_of, maps
from .fpn import FPN
from .layers import resize
from .plain import pyramid_of
from .precision import predicts_in_single
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

HEADS = ("upernet", "semantic_fpn", "fcn")
AUXILIARY_WEIGHT, AUXILIARY_CHANNELS = 0.4, 256
AUXILIARY_CONV = "auxiliary_head.convs.0.conv.weight"  # in mmseg's files and in ours
COUNTER = ".num_batches_tracked"  # of batch norms; files may lack it
CLASSIFIERS = ("decode_head.classifier", "auxiliary_head.classifier")
LEAST_WEIGHT = torch.finfo(torch.float32).tiny
LEAST = 32  # smallest side in pixels that every backbone takes


class Segmenter(OverBackbone):
    """Logits of every pixel of images of any size, or, given labels, losses.

    backbone        returns maps of an image, fine to coarse; the last `levels` are read
    pyramid         those maps, if they all have one stride, -> maps of several strides
    neck            these maps -> what the heads read
    decode_head     -> logits at the finest of these maps
    auxiliary_head  None, or a second head whose loss counts 0.4 and that does not predict
    divisor         sides of images are padded to multiples of it
    class_weights   factors on the losses of each class's pixels; None: all the same. They affect what is learned first,
                    not what is predicted: logits are corrected to those of equal weights. State dicts contain them, and
                    a loaded model predicts as the saved one did, whichever weights this model has. A state dict without
                    them is taken to have learned with equal weights if it comes from a file (`zoo.load_checkpoint`),
                    and with this model's own in `load_state_dict`: earlier versions did not save them
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        *,
        levels: int = 4,
        pyramid: nn.Module | None = None,
        neck: nn.Module | None = None,
        auxiliary_head: nn.Module | None = None,
        divisor: int = 1,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = nn.Identity() if pyramid is None else pyramid
        self.neck = nn.Identity() if neck is None else neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        # enlarged in bfloat16, logits that differ little become equal, and another class may become the largest
        predicts_in_single(decode_head, auxiliary_head)
        self.levels = levels
        self.divisor = divisor
        self.ignore_index = ignore_index
        self.num_classes = decode_head.classifier.out_channels
        # kept as numbers too: a buffer built on "meta" has no values later, and a checkpoint may be read into it
        self._weights = None if class_weights is None else _checked(class_weights, self.num_classes)
        self.register_buffer("class_weights", self._own_weights())
        # what zoo.load_checkpoint initialises anew for another number of classes
        self.pretrained_cfg = {"classifier": CLASSIFIERS}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Segmenter":
        """What `to`, `to_empty` and the like call, also on a module around this one."""
        before = self.class_weights
        super()._apply(fn, recurse)
        held = self.class_weights
        if held is None or held.is_meta:
            return self
        if before.is_meta and self._weights is not None:
            before = self._own_weights().to(held.dtype if held.dtype.itemsize > 4 else torch.float32)
            self.class_weights = before.to(held.device)
        elif held.dtype.itemsize < 4:  # logits are in float32, also those of a model in bfloat16
            self.class_weights = before.to(held.device)
        return self

    def _own_weights(self) -> Tensor | None:
        return None if self._weights is None else torch.tensor(self._weights, dtype=torch.float32)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Runs in `load_state_dict` before the heads load: adapts their classifiers to the class weights here."""
        self._reweigh(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Adapt a file's state dict, in place, to the class weights here: its classifiers learned with the file's.

        A file without any is taken to have equal weights. Raises CheckpointError for class weights that do not match
        the classifiers.
        """
        bias = state.get(f"{CLASSIFIERS[0]}.bias")
        if self.class_weights is not None and bias is not None:
            state.setdefault("class_weights", torch.ones(bias.shape))
        self._reweigh(state)

    @torch.no_grad()
    def _reweigh(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """As `adopt`, but a state dict without class weights is taken to have learned with those here."""
        name = f"{prefix}class_weights"
        there, here = state.pop(name, None), self.class_weights
        if here is not None:
            # the buffer may hold the file's: torch.distributed.checkpoint reads into state dicts in place
            own = here if self._weights is None else self._own_weights()
            state[name] = here = own.to("cpu" if here.is_meta else here.device, here.dtype)
        if there is None or (
            here is not None and here.shape != there.shape
        ):  # for other classes the classifiers are new
            return
        exact = wide(there.dtype if here is None else torch.promote_types(there.dtype, here.dtype))
        shift = -there.to(exact).log()
        if here is not None:
            shift += here.to(shift).log()
        if not shift.any():
            return
        for key in (f"{prefix}{layer}.bias" for layer in CLASSIFIERS):
            if (bias := state.get(key)) is None:
                continue
            if bias.shape != shift.shape:
                shapes = f"{tuple(shift.shape)}, and {key} {tuple(bias.shape)}"
                raise CheckpointError(f"{name} is {shapes}: expected a weight for each class")
            state[key] = (bias.to(wide(bias.dtype)) + _spread_as(bias, shift)).to(bias.dtype)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(B, 3, H, W) -> logits (B, num_classes, H, W); with `targets` (B, H, W), integers, the losses of the heads.

        Sides below 32 pixels, or that `divisor` does not divide, are padded with zeros at the bottom and right, which
        targets ignore. The losses, "decode" and "auxiliary", are weighted, to be summed. Raises ValueError for targets
        of another size, or that are not integers, and if `ignore_index` is the number of a class.
        """
        size = images.shape[-2:]
        if targets is not None and targets.shape != (len(images), *size):
            raise ValueError(f"targets are {tuple(targets.shape)}, for images {tuple(images.shape)}: give (B, H, W)")
        if targets is not None:
            if 0 <= self.ignore_index < self.num_classes:
                said = f"ignore_index is {self.ignore_index}, one of the {self.num_classes} classes"
                raise ValueError(f"{said}, whose pixels would not count: give another number as ignore_index=")
            targets = _labels(targets)
        if self.divisor > 1 or min(size) < LEAST:
            images = self._filled(images, 0)
            targets = None if targets is None else self._filled(targets, self.ignore_index)
        features = self.neck(self.pyramid(maps(self.backbone, images, self.levels)))
        logits = self.decode_head(features)
        if targets is None:
            return resize(self._unweighted(logits), images.shape[-2:])[..., : size[0], : size[1]]
        losses = {"decode": self._loss(logits, targets)}
        if self.auxiliary_head is not None:
            losses["auxiliary"] = AUXILIARY_WEIGHT * self._loss(self.auxiliary_head(features), targets)
        return losses

    def _filled(self, x: Tensor, value: int) -> Tensor:  # (..., H, W) -> (..., H', W'), 32 at least
        height, width = (covering(max(side, LEAST), self.divisor) for side in x.shape[-2:])
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)

    def _unweighted(self, logits: Tensor) -> Tensor:
        """Training with weights learns probabilities times weights (Elkan, The foundations of cost-sensitive learning,
        2001); this divides by them.
        """
        return logits if self.class_weights is None else logits - self.class_weights.log()[:, None, None]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return pixel_loss(logits, targets, self.ignore_index, self.class_weights)

    def layouts(self) -> tuple[Layout, ...]:
        """How files name a whole segmenter with this backbone: mmseg's names around each of its layouts, then ours."""
        return self.layouts_around(MMSEG, OUR_HEADS)

    def unused(self, part: str) -> bool:
        """Whether to leave out a part of a file: the auxiliary head, if the model was built without one."""
        return part == "auxiliary_head" and self.auxiliary_head is None

    def advice(self, state: Mapping[str, Tensor]) -> str:
        """What helps if a file of a segmenter, its tensors as it names them, has another head or auxiliary head."""
        named = [name for name in state if name.startswith("decode_head.")]
        if not named:
            return ""
        want = {name for name in self.state_dict() if name.startswith("decode_head.") and not name.endswith(COUNTER)}
        if not any(
            {layout.ours(name) for name in named if not name.endswith(COUNTER)} == want for layout in self.layouts()
        ):
            return "Its head is of another kind: give that kind as head= (task.head= in a command)."
        if self.auxiliary_head is None:
            return ""
        there, here = state.get(AUXILIARY_CONV), self.auxiliary_head.convs[0].conv.weight
        if there is not None and there.shape == here.shape:
            return ""
        return (
            "Its auxiliary head, if it has one, is not this model's: auxiliary=False builds a segmenter without one, "
            "which predicts the same (task.auxiliary=false in a command)."
        )


def _labels(targets: Tensor) -> Tensor:
    """As int64, which cross entropy wants."""
    if targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}: expected integers, the labels of pixels")
    return targets.long()


def _spread_as(like: Tensor, x: Tensor) -> Tensor:
    """`x`, which every process holds completely, placed as `like` is: on its device, or sharded in the same way."""
    if not hasattr(like, "device_mesh"):
        return x.to(like.device)
    from torch.distributed.tensor import distribute_tensor  # not every build of torch has it

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def _checked(weights: Sequence[float], classes: int) -> tuple[float, ...]:
    expected = f"a number above 0 for each of {classes} classes"
    if len(weights) != classes:
        raise ValueError(f"class_weights is {list(weights)}; expected {expected}")
    return tuple(number("class_weights", weight, expected, least=LEAST_WEIGHT) for weight in weights)


def pixel_loss(logits: Tensor, targets: Tensor, ignore_index: int, weights: Tensor | None = None) -> Tensor:
    """Cross entropy of logits (B, classes, h, w), resized to `targets` (B, H, W), summed over the labelled pixels.

    The sum is divided by the number of all pixels, including ignored ones, as in the published models: a sparsely
    labelled batch weighs less, and one without any label gives 0, where the mean over labelled pixels would be NaN.

    weights  (classes) factors on the pixels of each class, which do not change the divisor, as in mmseg before 1.0; 1.2
             divides by the sum of the pixels' weights, and fails if any pixel is ignored
    """
    logits = resize(logits, targets.shape[-2:])
    # its own sum would use atomics on a GPU, in no fixed order
    weights = None if weights is None else weights.to(logits.dtype)
    losses = F.cross_entropy(logits, targets, weights, ignore_index=ignore_index, reduction="none")
    return losses.sum() / targets.numel()


def segmenter(
    backbone: str | nn.Module,
    num_classes: int,
    *,
    head: str = "upernet",
    channels: int | None = None,
    auxiliary: bool = True,
    dropout: float = 0.1,
    ignore_index: int = 255,
    class_weights: Sequence[float] | None = None,
    pretrained: bool = False,
    **backbone_kwargs: Any,
) -> Segmenter:
    """A segmenter on any backbone of the zoo, or any timm model with `features_only`.

    backbone      a name for timm.create_model, which gets `pretrained` and `backbone_kwargs`, or a model made with
                  features_only=True. A zoo model named here has a norm on every level if its family's published dense
                  models have them. If all maps have one stride, as ViT's, a `PlainPyramid` follows. Heads that read
                  four levels read all of a backbone with three, as LeViT. Images for a model of timm's are padded to
                  multiples of its largest stride, unless it only takes one size
    head          "upernet", "semantic_fpn", or "fcn" (on the last level)
    channels      default: 512; for "semantic_fpn" 256 in the pyramid, and half as many in the head
    auxiliary     adds an FCN of 256 channels on the last level but one; "semantic_fpn" has none. It does not predict: a
                  file with another auxiliary head, or with several, loads if this is False
    dropout       of whole channels, before the classifiers
    ignore_index  the label of pixels that do not count
    class_weights factors on the losses of each class's pixels, above 0; None: all the same
    Raises ValueError for a head of another name, no classes or channels, or a backbone without the levels that the head
    reads.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}")
    check_count("num_classes", num_classes, "the number of classes")
    if channels is not None:
        check_count("channels", channels, "channels of the head")
    auxiliary = auxiliary and head != "semantic_fpn"
    levels = 1 + auxiliary if head == "fcn" else 4
    backbone = backbone_of(backbone, levels, pretrained=pretrained, **backbone_kwargs)
    dims, reductions = backbone.feature_info.channels()[-levels:], backbone.feature_info.reduction()[-levels:]
    pyramid, reductions = pyramid_of(dims, reductions)
    neck = None
    if head == "semantic_fpn":
        width = channels or 256
        neck = FPN(dims, width)
        decode = SemanticFPN(width, num_classes, reductions=reductions, channels=width // 2, dropout=dropout)
    elif head == "upernet":
        decode = UPerNet(dims, num_classes, channels=channels or 512, dropout=dropout)
    else:
        decode = FCN(dims[-1], num_classes, channels=channels or 512, dropout=dropout)
    second = auxiliary_head(dims[-2], num_classes, dropout=dropout) if auxiliary else None
    parts = {"pyramid": pyramid, "neck": neck, "auxiliary_head": second, "divisor": divisor_of(backbone)}
    loss = {"ignore_index": ignore_index, "class_weights": class_weights}
    return Segmenter(backbone, decode, levels=levels, **parts, **loss)


def auxiliary_head(dim: int, num_classes: int, *, channels: int = AUXILIARY_CHANNELS, dropout: float = 0.1) -> FCN:
    """The auxiliary head of the published models, on the last level but one."""
    return FCN(dim, num_classes, level=-2, channels=channels, depth=1, concat=False, dropout=dropout)
