"""Effective receptive fields: how much each pixel of the image affects the unit in the middle of a feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoint import unwrapped
from . import canvas
from .calls import evaluating
from .look import Drawn, Look
from .picture import ShowError, pick

UNITS = 4  # fields are averages over this many


def receptive_field(model: nn.Module, x: Tensor, stage: int = -1) -> Tensor:
    """(H, W): |d unit / d pixel|, summed over colours, averaged over images and units, the largest being 1.

    A unit is the sum over channels, each with a random sign, at the position in the middle of the feature of a stage
    (without signs a normed feature has the same sum whatever the image). A pixel that has no path to it is exactly 0.

    model  any with timm's `forward_intermediates`; it may be compiled or wrapped as for `show.pictures`
    x      images as the model takes them, (B, C, H, W)
    stage  index of a feature that `forward_intermediates` returns, from the end if negative
    Raises ShowError for a model without that method, and for a stage that does not exist.
    Source: Luo et al. 2016, https://arxiv.org/abs/1701.04128, section 3.
    """
    model = unwrapped(model)
    x = x.detach().clone().requires_grad_()
    with evaluating(model), torch.enable_grad():
        features = features_of(model, x)
        feature = pick("stage", stage, features, type(model).__name__)
        middle = feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2].sum(0)  # (C,)
        units = signs(UNITS, len(middle)).to(middle) @ middle
        grads = [torch.autograd.grad(unit, x, retain_graph=True)[0] for unit in units]
    field = torch.stack(grads).abs().sum(2).mean((0, 1))
    return field / field.max().clamp(min=torch.finfo(field.dtype).tiny)


def features_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The features of all stages, (B, C, h, w) each. Raises ShowError for a model that returns none, or not of `x`."""
    if not hasattr(model, "forward_intermediates"):
        raise ShowError(f"{type(model).__name__} has no forward_intermediates: give a backbone of the zoo or of timm")
    try:
        return model.forward_intermediates(x, intermediates_only=True)
    except AssertionError as error:  # timm's, for a size that is not the model's
        size = " x ".join(map(str, x.shape[2:]))
        raise ShowError(f"{type(model).__name__} takes no images of {size}: {error} Give another img_size") from error


def signs(units: int, channels: int) -> Tensor:
    """(units, channels) of -1 and 1, the same each time."""
    return torch.randint(2, (units, channels), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def covered(field: Tensor) -> float:
    """Share of the image whose pixels, from the strongest on, make up 90 % of all influence."""
    ranked = field.flatten().sort(descending=True).values.double().cumsum(0)
    return float((ranked < 0.9 * ranked[-1]).sum() + 1) / len(ranked)


def fields(look: Look) -> Drawn:
    """The field of every stage, or of the chosen one."""
    stages = range(len(look.sides)) if look.stage is None else [look.stage]
    found = {f"field_{stage}": receptive_field(look.model, look.x, stage) for stage in stages}
    figure, axes = canvas.panels(1, len(found), look.title("effective receptive fields"), ratio=look.ratio)
    for ax, stage, field in zip(axes[0], stages, found.values(), strict=True):
        canvas.backdrop(ax, look.image, f"stage {stage}: 90 % in {covered(field):.1%} of the image")
        canvas.tiles(ax, field ** (1 / 3), (1, 1), cmap="inferno", vmin=0, vmax=1)
    return figure, found
