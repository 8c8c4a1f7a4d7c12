"""Mixup and CutMix, reproducible for each step."""

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from recipes.data.seeding import Stream, preserved, reseed


class Mix:
    """timm's Mixup/CutMix and label smoothing with the settings of `augment`, one draw per batch.

    Mixup, https://arxiv.org/abs/1710.09412; CutMix, https://arxiv.org/abs/1905.04899.
    """

    def __init__(self, augment, num_classes: int):
        self.num_classes, self.smoothing = num_classes, augment.label_smoothing
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images and (B,) labels -> mixed images and (B, classes) targets, a function of (seed, step).

        Without mixup and cutmix the images are returned unchanged, the targets smoothed.
        """
        if self.mixup is None:
            return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        size = len(images)
        # timm mixes image i with image B-1-i in place and needs an even B: an odd batch gets its first image twice
        extra = slice(0, size % 2)
        images, labels = torch.cat([images, images[extra]]), torch.cat([labels, labels[extra]])
        with preserved():
            reseed(Stream.MIX, seed, step)
            images, targets = self.mixup(images, labels)
        return images[:size], targets[:size]
