"""The image that is shown: from a file, or a photograph of scikit-learn, cropped to the size of the model."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..blocks import image_sides
from ..files import is_file, unreadable
from ..images import formats, to_rgb
from .picture import ShowError

PHOTOGRAPHS = ("flower", "china")  # of scikit-learn's, CC BY 2.0
Given = str | Path | Image.Image


def photograph(name: str = "flower") -> Image.Image:
    """A photograph that comes with scikit-learn: "flower" (by vultilion) or "china" (by danielbuechele), CC BY 2.0.

    Raises ShowError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError:
        raise ShowError(
            f"the photograph {name!r} comes with scikit-learn: pip install scikit-learn, or give your own image with "
            "image=FILE"
        ) from None
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def load(image: Given) -> Image.Image:
    """RGB, as the training loop reads it, from a file, a name of PHOTOGRAPHS, or as given.

    Raises ShowError if it cannot be read.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, (str, Path)):
        raise ShowError(
            f"the image is a {type(image).__name__}: give a file or a Pillow image, such as Image.fromarray(x)"
        )
    if str(image) in PHOTOGRAPHS:
        return photograph(str(image))
    try:
        there = is_file(image)
    except OSError as error:
        raise ShowError(unreadable(image, error)) from error
    if not there:
        names = " or ".join(PHOTOGRAPHS)
        raise ShowError(f"there is no image {image}: give a file, or {names}, which come with scikit-learn")
    try:
        with Image.open(image, formats=formats()) as opened:
            opened.load()  # Pillow decodes late, and the file will be closed
            return to_rgb(opened)
    except Exception as error:  # Pillow's decoders raise a dozen types
        raise ShowError(f"{image} cannot be read as an image: {type(error).__name__}: {error}") from error


def cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest part of `size` proportions in the middle, resized to `size`, (height, width)."""
    return ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)


def size_of(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that a model was built for."""
    own = getattr(model, "img_size", None)  # of a model of timm's it may be one number
    return image_sides(own or resolve_data_config({}, model=model)["input_size"][1:])


def as_input(image: Image.Image, model: nn.Module) -> Tensor:
    """(1, C, H, W), normalised as the model's configuration says, on its device and in its precision."""
    like, channels = next(model.parameters()), getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise ShowError(f"the model takes images of {channels} channels: expected 1 or 3")
    values = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    x = torch.from_numpy(values).reshape(*values.shape[:2], channels).permute(2, 0, 1)[None]
    cfg = resolve_data_config({}, model=model)
    mean, std = (torch.tensor(cfg[key][:channels])[:, None, None] for key in ("mean", "std"))
    return ((x - mean) / std).to(like)
