"""From a PIL image to a normalised tensor, by timm's transforms."""

from collections.abc import Callable

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms as tv

Transform = Callable[[Image.Image], Tensor]


def train_transform(augment, *, size: tuple[int, int], mean: tuple, std: tuple, interpolation: str) -> Transform:
    """Random resized crop, flip, colours and erasing as the `augment` group says; source: timm's create_transform.

    augment.auto_augment takes timm's notation (rand-m9-mstd0.5-inc1, augmix-..., original) or `ta_wide`, torchvision's
    TrivialAugment.
    """
    interpolation = augment.interpolation or interpolation
    wide = augment.auto_augment == "ta_wide"
    primary, secondary, final = create_transform(
        (3, *size),
        is_training=True,
        separate=True,
        scale=tuple(augment.scale),
        ratio=tuple(augment.ratio),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=None if wide else augment.auto_augment,
        interpolation=interpolation,
        mean=mean,
        std=std,
        re_prob=augment.re_prob,
        re_mode=augment.re_mode,
    )
    if wide:
        fill = [round(255 * m) for m in mean]
        mode = str_to_interp_mode("bilinear" if interpolation == "random" else interpolation)
        secondary = tv.TrivialAugmentWide(interpolation=mode, fill=fill)
    _allow_no_bits(secondary)
    return tv.Compose([primary, secondary, final])


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    return auto_augment.posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _allow_no_bits(transform: tv.Compose) -> None:
    """Give timm's policies a posterisation that knows 0 bits, which they ask for at full strength.

    Older Pillow made such an image black, Pillow 13 raises an error.
    """
    for policy in getattr(transform, "transforms", []):
        chains = [getattr(policy, "ops", []), *getattr(policy, "policy", [])]
        for op in (op for chain in chains for op in chain):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


def eval_transform(
    *, size: tuple[int, int], mean: tuple, std: tuple, interpolation: str, crop_pct: float, crop_mode: str
) -> Transform:
    """Resize so that the crop is `crop_pct` of the short side, crop the centre (or squash), normalise."""
    return create_transform(
        (3, *size),
        is_training=False,
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
