"""From files to tensors: mixing, augmentation, sizes, colours."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms as tv

from recipes.config import compose
from recipes.data import Mix, build
from recipes.data.images import to_rgb
from recipes.data.transforms import eval_transform
from source_cases import MIX, config, make, photos


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_mix(size):
    images, labels = torch.rand(size, 3, 16, 16), torch.arange(size) % 4
    before = images.clone()
    mix = Mix(OmegaConf.create(MIX), 4)
    one, targets = mix(images, labels, seed=0, step=3)
    assert torch.equal(images, before) and one.shape == images.shape and targets.shape == (size, 4)
    assert torch.allclose(targets.sum(1), torch.ones(size))
    again = mix(images, labels, seed=0, step=3)
    assert torch.equal(one, again[0]) and torch.equal(targets, again[1])
    if size > 1:
        assert not torch.equal(one, mix(images, labels, seed=0, step=4)[0])
        assert not torch.equal(one, mix(images, labels, seed=1, step=3)[0])


def test_mixup_mixes_pairs_of_an_odd_batch():
    """Images that are constant: the mixed value and the target tell the same lambda and partner."""
    labels = torch.tensor([0, 1, 2])
    images = labels.float()[:, None, None, None].expand(3, 3, 4, 4)
    mix = Mix(OmegaConf.create(MIX | {"cutmix": 0.0, "label_smoothing": 0.0}), 3)
    mixed, targets = mix(images, labels, seed=0, step=1)
    assert torch.allclose(mixed[:, 0, 0, 0], targets @ torch.arange(3.0))
    assert 0 < targets.max(1)[0][1] < 1  # the middle image has a partner


def test_how_often_and_which_of_both():
    labels = torch.arange(4)
    images = labels.float()[:, None, None, None].expand(4, 3, 16, 16)
    for step in range(8):
        rarely, _ = Mix(OmegaConf.create(MIX | {"mix_prob": 0.0}), 4)(images, labels, seed=0, step=step)
        cut, _ = Mix(OmegaConf.create(MIX | {"switch_prob": 1.0}), 4)(images, labels, seed=0, step=step)
        blended, _ = Mix(OmegaConf.create(MIX | {"switch_prob": 0.0}), 4)(images, labels, seed=0, step=step)
        assert torch.equal(rarely, images)
        assert set(cut.unique().tolist()) <= {0, 1, 2, 3}
        assert torch.equal(blended, blended[..., :1, :1].expand_as(blended))


def test_without_mixing_only_labels_are_smoothed():
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 2, 1])
    same_images, targets = Mix(OmegaConf.create(MIX | {"mixup": 0.0, "cutmix": 0.0}), 4)(images, labels, seed=0, step=0)
    assert torch.equal(images, same_images)
    expected = torch.full((3, 4), 0.025).scatter(1, labels[:, None], 0.925)
    assert torch.allclose(targets, expected)


@pytest.mark.parametrize("policy", [None, "rand-m15-mmax15-n2-p1.0", "ta_wide", "augmix-m3-w3", "original"])
def test_every_policy_runs(policy):
    source = build(OmegaConf.merge(config(), {"augment": {"auto_augment": policy, "interpolation": "random"}})).train
    images = torch.stack([source.sample(index, 0)[0] for index in range(8)])
    assert images.isfinite().all() and images.shape == (8, 3, 32, 32)
    assert not torch.equal(source.sample(0, 0)[0], source.sample(0, 1)[0])


def test_trivial_augment_moves_in_black():
    """As in torchvision's script, which gives it no colour; timm's policies have the mean."""
    asked = {"augment": {"auto_augment": "ta_wide"}, "data": {"mean": [0.2, 0.4, 0.6]}}
    source = build(OmegaConf.merge(config(), asked)).train
    policy = next(each for each in source.transform.transforms if isinstance(each, tv.TrivialAugmentWide))
    torch.manual_seed(0)
    seen = {tuple(pixel) for _ in range(50) for pixel in np.asarray(policy(Image.new("RGB", (8, 8), "white")))[0]}
    assert (0, 0, 0) in seen and (51, 102, 153) not in seen


def test_crops_mirrors_and_erasing_are_as_configured():
    flips = {"hflip": 0.3, "vflip": 0.2}
    asked = {"scale": [0.5, 0.8], "ratio": [0.9, 1.1], **flips, "re_prob": 0.7, "re_mode": "pixel"}
    source = build(OmegaConf.merge(config(), {"augment": asked})).train
    crop, mirror, over, *_, erase = source.transform.transforms
    assert (crop.crop.scale, crop.crop.ratio) == ((0.5, 0.8), (0.9, 1.1))
    assert (mirror.p, over.p, erase.probability, erase.per_pixel) == (0.3, 0.2, 0.7, True)
    never = build(OmegaConf.merge(config(), {"augment": {"hflip": 0.0, "re_prob": 0.0}})).train.transform.transforms
    assert len(never) == len(source.transform.transforms) - 3


EVALUATED = {"size": (32, 32), "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear", "crop_pct": 1.0}


def test_a_squashed_image_is_seen_from_end_to_end():
    image = Image.new("RGB", (100, 40), "grey")
    image.paste("white", (0, 0, 25, 40))
    image.paste("black", (75, 0, 100, 40))
    squashed = eval_transform(**EVALUATED, crop_mode="squash")(image)
    assert squashed[:, :, 0].min() > 0.99 and squashed[:, :, -1].max() < 0.01
    cropped = eval_transform(**EVALUATED, crop_mode="center")(image)
    assert cropped.min() > 0.4 and cropped.max() < 0.6


@pytest.mark.parametrize("size", [(6500, 1), (1, 6500)])
def test_the_middle_of_a_long_image_is_kept(size):
    image = Image.new("RGB", size)
    image.paste("white", tuple(min(3240, side - 1) for side in size) + tuple(min(3260, side) for side in size))
    assert eval_transform(**EVALUATED, crop_mode="center")(image).min() > 0.99


def test_sizes_that_are_no_squares():
    data = make(img_size=[32, 48])
    assert data.img_size == (32, 48)
    assert data.train.sample(0, 0)[0].shape == data.val.sample(0, 0)[0].shape == (3, 32, 48)


def test_unset_preprocessing_is_the_models(tmp_path):
    cfg = compose(["data=imagefolder", f"data.root={tmp_path}", "model=maxvit_t_384"])
    photos(tmp_path)
    data = build(cfg)
    assert data.img_size == 384 and data.train.sample(0, 0)[0].shape == (3, 384, 384)
    data = build(OmegaConf.merge(cfg, {"data": {"img_size": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}))
    white = torch.ones(3) - torch.tensor([0.1, 0.2, 0.3])
    assert torch.allclose(data.val.transform(Image.new("RGB", (40, 40), "white"))[:, 0, 0], white, atol=1e-6)


COLOURS = {
    "L": (Image.new("L", (4, 4), 100), (100, 100, 100)),
    "LA": (Image.new("LA", (4, 4), (100, 51)), (224, 224, 224)),  # a fifth of 100 over white
    "RGBA": (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
    "opaque": (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
    "CMYK": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
    "P": (Image.new("RGB", (4, 4), (204, 0, 0)).convert("P"), (204, 0, 0)),
    "1": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "16-bit": (Image.fromarray(np.full((4, 4), 30000, np.uint16)), (117, 117, 117)),
    "16-bit, big-endian": (Image.fromarray(np.full((4, 4), 30000, ">u2")), (117, 117, 117)),
    "32-bit": (Image.fromarray(np.full((4, 4), 30000, np.int32)), (117, 117, 117)),
    "float": (Image.fromarray(np.full((4, 4), 0.5, np.float32)), (127, 127, 127)),
    "float, up to 1": (Image.fromarray(np.eye(4, dtype=np.float32)), (255, 255, 255)),
    "float, infinite": (Image.fromarray(np.full((4, 4), np.inf, np.float32)), (255, 255, 255)),
    "float, with infinite ones": (Image.fromarray(np.float32([[np.inf, -np.inf], [np.nan, 0.5]])), (127, 127, 127)),
}


@pytest.mark.parametrize("mode", COLOURS)
def test_colours_become_rgb(mode):
    image, expected = COLOURS[mode]
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and np.abs(np.subtract(rgb.getpixel((1, 1)), expected)).max() <= 2


def test_palette_with_transparency(recwarn):
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30] * 256)
    image.info["transparency"] = bytes(range(256))
    image.putdata([0, 255, 0, 255] * 4)  # transparent, opaque
    rgb = to_rgb(image)
    assert rgb.getpixel((0, 0)) == (255, 255, 255) and rgb.getpixel((1, 0)) == (10, 20, 30) and not recwarn.list


def test_every_strength_of_every_operation_runs():
    """timm's posterisation to 0 bits is an error of Pillow 13."""
    source = build(OmegaConf.merge(config(), {"augment": {"auto_augment": "rand-m10-n2-p1.0-mstd0.5-inc1"}})).train
    policy = next(t for t in source.transform.transforms if hasattr(t, "transforms")).transforms[0]
    image = source.image(0)
    for op in policy.ops:
        for op.magnitude in range(11):
            assert op(image).size == image.size, op
