"""From a PIL image to a normalised tensor, with timm's transforms."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import functional as F

from recipes.data.images import Jpeg

Transform = Callable[[Image.Image], Tensor]
LONGEST = 64  # times the short side; longer images are centre-cropped before they are resized


def train_transform(augment, *, size: tuple[int, int], mean: tuple, std: tuple, interpolation: str) -> Transform:
    """Random resized crop, flip, colours and erasing with the settings of `augment`; source: timm's create_transform.

    augment.auto_augment takes timm's notation (rand-m9-mstd0.5-inc1, augmix-..., original), with the mean colour where
    an image is moved away, or `ta_wide`, torchvision's TrivialAugment, with black there, as in torchvision's scripts.
    The transform also takes an undecoded Jpeg.
    """
    given = timm_options(augment, interpolation)
    primary, secondary, final = create_transform(
        (3, *size), is_training=True, separate=True, mean=mean, std=std, **given
    )
    if augment.auto_augment == "ta_wide":
        mode = str_to_interp_mode("bilinear" if given["interpolation"] == "random" else given["interpolation"])
        secondary = tv.TrivialAugmentWide(interpolation=mode)
    allow_no_bits(secondary)
    crop, *mirror = primary.transforms
    _, _, *erase = final.transforms
    return tv.Compose([Crop(crop), *mirror, secondary, Normalize(mean, std), *erase])


def timm_options(augment, interpolation: str) -> dict[str, Any]:
    """The settings of `augment` as timm takes them, which has no `ta_wide`."""
    return {
        "scale": tuple(augment.scale),
        "ratio": tuple(augment.ratio),
        "hflip": augment.hflip,
        "vflip": augment.vflip,
        "color_jitter": augment.color_jitter or None,
        "auto_augment": None if augment.auto_augment == "ta_wide" else augment.auto_augment,
        "interpolation": augment.interpolation or interpolation,
        "re_prob": augment.re_prob,
        "re_mode": augment.re_mode,
    }


class Crop:
    """timm's random resized crop; a large crop of an undecoded Jpeg is taken from a smaller decoding.

    An image is decoded at the smallest of 1, 1/2, 1/4, 1/8 that leaves the crop at least as large as its result, so
    that nothing is upscaled that timm would not upscale. The draws are timm's; at 1 the result is timm's, bit for bit.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, image: Image.Image | Jpeg) -> Image.Image:
        if isinstance(image, Image.Image):
            return self.crop(image)
        top, left, height, width = self.crop.get_params(image.header, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple | list) else modes
        factor = reduction((height, width), self.crop.size)
        pixels = image.decode(factor)
        if factor == 1:
            return F.resized_crop(pixels, top, left, height, width, self.crop.size, mode)
        box = [side / factor for side in (left, top, left + width, top + height)]
        return pixels.resize(self.crop.size[::-1], Image.Resampling[mode.name], box=box)


def reduction(crop: tuple[int, int], size: tuple[int, int]) -> int:
    """The largest of 8, 4, 2, 1 by which a crop can be divided and is still no smaller than `size`."""
    ratio = min(side / least for side, least in zip(crop, size, strict=True))
    return next((factor for factor in (8, 4, 2) if ratio >= factor), 1)


MOST = np.array([255], np.float32)  # of a byte


class Normalize:
    """torchvision's ToTensor and Normalize in one, bit-identical in a third of the time."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = (np.array(values, np.float32)[:, None, None] for values in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        return self.finish(self.planes(image))

    def planes(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8"""
        return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))

    def finish(self, planes: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> float32, normalised; bit-identical for a batch and for its images.

        On a CPU with numpy, one image at a time: it stays in the cache, and no thread waits for a worker's core.
        """
        if planes.device.type != "cpu":
            return self._on_device(planes)
        result = np.empty(planes.shape, np.float32)
        images = planes.numpy().reshape(-1, *planes.shape[-3:])
        for image, out in zip(images, result.reshape(images.shape), strict=True):
            np.divide(image, np.float32(255), out=out, dtype=np.float32)
            np.subtract(out, self.mean, out=out)
            np.divide(out, self.std, out=out)
        return torch.from_numpy(result)

    def _on_device(self, planes: Tensor) -> Tensor:
        # by a tensor: division by a number would be a multiplication by its inverse there, which rounds differently
        most, mean, std = (_placed(values.tobytes(), planes.device) for values in (MOST, self.mean, self.std))
        return planes.to(torch.float32).div_(most).sub_(mean).div_(std)


@cache
def _placed(values: bytes, device: torch.device) -> Tensor:
    """(N, 1, 1) float32 on a device, copied there once: the CPU would wait for each copy."""
    return torch.tensor(np.frombuffer(values, np.float32), device=device)[:, None, None]


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    return auto_augment.posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def allow_no_bits(transform: tv.Compose) -> None:
    """Give timm's policies a posterisation that accepts 0 bits, which they use at full strength.

    Older versions of Pillow made such an image black, Pillow 13 raises an error.
    """
    for policy in getattr(transform, "transforms", []):
        chains = [getattr(policy, "ops", []), *getattr(policy, "policy", [])]
        for op in (op for chain in chains for op in chain):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


def eval_transform(
    *, size: tuple[int, int], mean: tuple, std: tuple, interpolation: str, crop_pct: float, crop_mode: str
) -> Transform:
    """Resize so that the crop is `crop_pct` of the short side, crop the centre (or squash), normalise.

    An image more than 64 times as long as it is wide is cropped first: resized, it would fill the memory.
    """
    transform = create_transform(
        (3, *size),
        is_training=False,
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    *resize, _, _ = transform.transforms
    return tv.Compose([*([_cut_ends] if crop_mode == "center" else []), *resize, Normalize(mean, std)])


def _cut_ends(image: Image.Image) -> Image.Image:
    width, height = (min(side, LONGEST * min(image.size)) for side in image.size)
    left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image
