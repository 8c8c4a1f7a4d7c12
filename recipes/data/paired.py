"""Transforms of an image with its label map, or with its boxes and masks: torchvision's v2 and what it lacks.

An image is a tv_tensors.Image, (3, H, W) uint8. A target is a dictionary: `labels`, a tv_tensors.Mask (H, W); or
`boxes`, tv_tensors.BoundingBoxes, `masks`, a tv_tensors.Mask (N, H, W), and what belongs to each box. All random draws
come from torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IGNORE = 255  # the label of pixels that neither losses nor metrics count
TRIES = 10  # crops that are drawn if one class fills them


class Rescale(v2.Transform):
    """Resize, keeping the aspect ratio: the short side to `short`, but the long one to at most `long`.

    short   pixels, drawn if there are several; None: only the long side is limited, or, without `long`, the size stays
    jitter  both are multiplied by a number drawn from this range: scale jitter; with (0.1, 2) large-scale jitter,
            https://arxiv.org/abs/2012.07177
    multiple  pixels: the result is resized again, each side up to a multiple of this, which changes the aspect ratio a
            little; None: it is not
    antialias  whether a pixel of a smaller image is the mean of all that it covers; False: of four, as in OpenCV
    scale   factor on `short` and `long`, rounded down to whole pixels; without either, on the image's sides
    """

    def __init__(
        self,
        short: Sequence[int] | None = None,
        long: int | None = None,
        jitter: Sequence[float] = (1, 1),
        multiple: int | None = None,
        antialias: bool = True,
        scale: float = 1.0,
    ):
        super().__init__()
        self.short, self.long, self.jitter, self.multiple = short, long, jitter, multiple or 1
        self.antialias, self.scale = antialias, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        limits = []
        if self.short is not None:
            drawn = self.short[int(torch.randint(len(self.short), ()))]
            limits.append(int(drawn * self.scale) / min(height, width))
        if self.long is not None:
            limits.append(int(self.long * self.scale) / max(height, width))
        scale = min(limits, default=self.scale) * float(torch.empty(()).uniform_(*self.jitter))
        size = [max(1, int(side * scale + 0.5)) for side in (height, width)]
        return {"sizes": (size, [-(-side // self.multiple) * self.multiple for side in size])}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        for size in params["sizes"]:  # a no-op if it already has that size
            inpt = F.resize(inpt, size, antialias=self.antialias)
        return inpt


class AtScales:
    """An image as a list, with one entry per transform."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]):
        self.steps = steps

    def __call__(self, image: tv_tensors.Image) -> list[tv_tensors.Image]:
        return [step(image) for step in self.steps]


def mapped(function: Callable[[Any], Any], images: Any) -> Any:
    """`function` of an image, or of each image in a list, which may be nested."""
    return [mapped(function, image) for image in images] if isinstance(images, list) else function(images)


class Crop(v2.Transform):
    """A random crop of `size` (height, width), or less if the image is smaller.

    cap  for a label map: the largest share of labelled pixels that one class may have, else another crop is drawn, at
         most ten in all. 1 takes the first.
    """

    def __init__(self, size: tuple[int, int], cap: float = 1.0):
        super().__init__()
        self.size, self.cap = size, cap

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        crop = self.sides(height, width)
        labels = next((item for item in flat_inputs if isinstance(item, tv_tensors.Mask)), None)
        first = self.cap >= 1 or crop == (height, width)  # any crop will do, or there is no other
        for _ in range(1 if first else TRIES):
            top, left = (
                int(torch.randint(side - part + 1, ())) for side, part in zip((height, width), crop, strict=True)
            )
            if first or _is_mixed(labels[top : top + crop[0], left : left + crop[1]], self.cap):
                break
        return {"top": top, "left": left, "height": crop[0], "width": crop[1]}

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """The sides of the crop from an image of this size."""
        return min(self.size[0], height), min(self.size[1], width)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PartOf(Crop):
    """A random crop whose sides are drawn independently, `least` to `most` pixels, or less if the image is smaller."""

    def __init__(self, least: int, most: int):
        super().__init__((most, most))
        self.least = least

    def sides(self, height: int, width: int) -> tuple[int, int]:
        down, across = (
            int(torch.randint(min(self.least, side), most + 1, ()))
            for side, most in zip((height, width), super().sides(height, width), strict=True)
        )
        return down, across


class PadTo(v2.Transform):
    """Pad below and to the right up to `size` (height, width): images with `colour`, masks with `label`.

    The image is uint8, so the colour is rounded: once normalised, a mean is up to 0.01 away from 0.
    """

    def __init__(self, size: tuple[int, int], colour: Sequence[float], label: int):
        super().__init__()
        self.size, self.colour, self.label = size, [round(255 * part) for part in colour], label

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not any(params["padding"]):
            return inpt
        return F.pad(inpt, fill=self.label if isinstance(inpt, tv_tensors.Mask) else self.colour, **params)


class Distort(v2.Transform):
    """Change brightness, contrast, saturation and hue of an image, each with probability 0.5, as in mmsegmentation.

    The image is uint8 after each change. Unlike here, OpenCV also rounds hue and saturation, to 180 and 256 values.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        brightness = brightened, float(torch.empty(()).uniform_(-32, 32))
        contrast, saturation = (
            (change, float(torch.empty(()).uniform_(0.5, 1.5))) for change in (contrasted, saturated)
        )
        hue = turned, int(torch.randint(-18, 18, ())) / 180
        early = brightness, contrast, saturation, hue
        late = brightness, saturation, hue, contrast
        order = early if torch.randint(2, ()) else late
        return {"steps": [step for step in order if torch.randint(2, ())]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(Tensor)
        for change, amount in params["steps"]:
            image = change(image, amount)
        return tv_tensors.wrap(image, like=inpt)


def brightened(image: Tensor, summand: float) -> Tensor:
    """uint8 (3, H, W) with `summand` added to every pixel; fractions are truncated, as in `contrasted`."""
    return (image + summand).clamp(0, 255).to(torch.uint8)


def contrasted(image: Tensor, factor: float) -> Tensor:
    """uint8 (3, H, W), every pixel multiplied by `factor`, which changes the contrast."""
    return (image * factor).clamp(0, 255).to(torch.uint8)


def saturated(image: Tensor, factor: float) -> Tensor:
    """uint8 (3, H, W), the saturation of HSV multiplied, up to 1: how far channels are below the largest one."""
    largest, least = image.amax(0).float(), image.amin(0).float()
    most = largest / (largest - least)  # makes the least channel 0; infinite, or 0 / 0, for a grey pixel, which stays
    factors = most.clamp(max=factor).nan_to_num(0.0)
    return (largest - (largest - image) * factors).round().to(torch.uint8)


def turned(image: Tensor, share: float) -> Tensor:
    """uint8 (3, H, W), the hue of HSV moved by a share of its circle."""
    return (255 * F.adjust_hue(image / 255, share)).round().to(torch.uint8)


class Sound(v2.Transform):
    """Remove objects that are no longer visible: boxes or masks without a pixel."""

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> tuple[tv_tensors.Image, dict[str, Any]]:
        boxes = target["boxes"]
        kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        if "masks" in target:
            kept &= target["masks"].flatten(1).any(1)
        kept = kept.as_subclass(Tensor)
        return image, {key: tv_tensors.wrap(value[kept], like=value) for key, value in target.items()}


def training(data: Any, task: Any, size: tuple[int, int], mean: Sequence[float], *, semantic: bool) -> v2.Compose:
    """The transforms of the `data` and `task` groups: rescale, crop and pad to `size` if asked for, flip, distort."""
    short = [data.short_side] if isinstance(data.short_side, int) else data.short_side
    antialias = antialiased(data)
    steps = [Rescale(short, data.long_side, task.jitter, antialias=antialias)]
    if task.get("precrop"):  # detection: the second of DETR's two variants, https://arxiv.org/abs/2005.12872, A.4
        part = [Rescale([400, 500, 600], data.long_side, antialias=antialias), PartOf(384, 600)]
        steps.insert(0, v2.RandomApply(part, task.precrop))
    if task.crop:
        steps.append(Crop(size, task.category_cap if semantic else 1.0))
    steps.append(v2.RandomHorizontalFlip(data.hflip))
    if data.vflip:  # else nothing is drawn, as in runs from before there was this key
        steps.append(v2.RandomVerticalFlip(data.vflip))
    if task.photometric:
        steps.append(Distort())
    if task.crop:
        steps.append(PadTo(size, mean, IGNORE if semantic else 0))
    return v2.Compose(steps if semantic else [*steps, Sound()])


def evaluation(data: Any, scales: Sequence[float] | None = None) -> Rescale | AtScales:
    """The image at its own size, or at the largest of `data.short_side`.

    scales  factors on that, as in mmsegmentation before 1.0; None: only 1. Otherwise the image becomes a list, each
            entry resized from the original
    """
    short = data.short_side
    short = None if short is None else [short] if isinstance(short, int) else [max(short)]
    multiple = data.get("side_multiple")  # runs of older versions lack the key
    steps = [
        Rescale(short, data.long_side, multiple=multiple, antialias=antialiased(data), scale=scale)
        for scale in scales or (1.0,)
    ]
    return steps[0] if [step.scale for step in steps] == [1.0] else AtScales(steps)


def antialiased(data: Any) -> bool:
    """What `data.antialias` stands for; runs of older versions lack the key."""
    antialias = data.get("antialias")
    return True if antialias is None else antialias


def _size(flat_inputs: list[Any]) -> tuple[int, int]:
    height, width = F.get_size(next(item for item in flat_inputs if isinstance(item, tv_tensors.Image)))
    return height, width


def _is_mixed(labels: Tensor, cap: float) -> bool:
    counts = torch.bincount(labels[labels != IGNORE].flatten().int())
    return int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < cap
