"""Data sets for the tests: small, built by the configuration, all batches of them at once."""

from functools import cache

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from recipes.config import compose
from recipes.data import Data, batches, build

MIX = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1}


@cache
def config(name: str = "digits") -> DictConfig:
    """Small images and much augmentation."""
    policy = "augment.auto_augment=rand-m9-mstd0.5-inc1"
    return compose([f"data={name}", policy, "augment.re_prob=0.5", "data.img_size=32"])


def make(name: str = "digits", **changes) -> Data:
    """Build a data set with some keys of its group changed."""
    return build(OmegaConf.merge(config(name), {"data": changes}))


def all_of(source, **options) -> list:
    """Every batch of an epoch."""
    options = {"batch_size": 64, "seed": 0, "epoch": 0, "train": True, "workers": 0} | options
    return list(batches(source, **options))


def same(one: list, other: list) -> bool:
    """Whether two epochs hold the same bits."""
    return len(one) == len(other) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True)
    )


def photos(root, classes=("ant", "bee", "cat"), count=3):
    """train/ and val/ with one JPEG of one colour each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                colour = tuple(rng.integers(0, 255, 3).tolist())
                Image.new("RGB", (40, 36), colour).save(root / split / name / f"{number}.jpg")
    return root
